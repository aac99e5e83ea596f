"""Decisions: what the run chose by itself is said once, recorded, and the same when the run goes on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier.logs import set_up
from luthier.runs.writing.decisions import Decisions

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3), lambda inner: st.lists(inner, max_size=2)
)


@given(taken=st.dictionaries(st.text(max_size=3), st.tuples(VALUES, st.text(max_size=5)), max_size=4))
def test_what_was_recorded_is_taken_again_whatever_would_be_decided_now(taken):
    first = Decisions()
    values = {name: first.take(name, lambda pair=pair: pair) for name, pair in taken.items()}
    again = Decisions(first.to_dict())
    assert {name: again.take(name, lambda: ("otherwise", "now")) for name in taken} == values
    assert again.to_dict() == first.to_dict() == {n: {"value": v, "reason": r} for n, (v, r) in taken.items()}


def test_a_decision_is_taken_once():
    answers = iter([(1, "first"), (2, "second")])
    decisions = Decisions()
    assert [decisions.take("size", lambda: next(answers)) for _ in range(2)] == [1, 1]


def test_an_explicit_value_wins_over_the_held_one():
    decisions = Decisions({"threads": {"value": 8, "reason": "free cores"}})
    assert decisions.explicit("threads", 2) == 2
    assert decisions.to_dict() == {"threads": {"value": 2, "reason": "set in the recipe"}}


def test_a_held_value_that_cannot_be_had_here_is_decided_anew_aloud(capsys):
    set_up("warning")
    decisions = Decisions({"device": {"value": "cuda", "reason": "a GPU"}})
    assert decisions.take("device", lambda: ("cpu", "no GPU"), usable=lambda value: value == "cpu") == "cpu"
    assert "decided anew" in capsys.readouterr().err


def test_what_is_held_and_not_asked_for_stays_recorded():
    held = {"later": {"value": 1, "reason": "then"}}
    assert Decisions(held).to_dict() == held


def test_each_decision_is_said_once_with_its_reason(capsys):
    set_up("debug")
    decisions = Decisions({"compile": {"value": True, "reason": "it pays"}})
    for _ in range(2):
        decisions.take("precision", lambda: ("float32", "a tiny model"))
        decisions.take("compile", lambda: (False, "not now"))
    first, second = capsys.readouterr().err.splitlines()
    set_up("warning")
    assert "decided" in first and "float32" in first and "a tiny model" in first
    assert "compile" in second and "when the run began" in second


def test_a_value_that_no_file_can_hold_is_refused_where_it_is_decided():
    with pytest.raises(TypeError):
        Decisions().take("dtype", lambda: (object(), "because"))
