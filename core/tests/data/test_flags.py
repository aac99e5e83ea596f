"""Flags of messages: whatever a trainer calls them, they decide what is supervised and how much it counts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.formats.message_flags import FLAGS, NUMBERS, OPPOSITES, SWITCHES
from luthier.data.formats.wanted import Wanted
from luthier.testing import expect_error

QUIET = settings(max_examples=30, deadline=None)
WEIGHTS = st.lists(st.sampled_from([None, 0, 0.25, 0.5, 1, 2.5]), min_size=1, max_size=5)
SPELLINGS = {
    "messages": lambda turns: {"messages": turns},
    "sharegpt": lambda turns: {"conversations": turns},
    "from_value": lambda turns: {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]}
            | {k: v for k, v in t.items() if k not in ("role", "content")}
            for t in turns
        ]
    },
    "prompt_completion": lambda turns: {"prompt": turns[:1], "completion": turns[1:]},
}


def talk(*flags):
    """Questions with answers `0`, `1`, ...; each answer has the flags given."""
    pairs = [
        ({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}", **own})
        for i, own in enumerate(flags)
    ]
    return [turn for pair in pairs for turn in pair]


def supervised(prepared, answers, tokenizer):
    """Each supervised answer with its weight, in order."""
    found = [(text.removesuffix("<|im_end|>"), e.weight) for e in prepared.train for text in answers(e, tokenizer)]
    return sorted(found)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_in_every_form_takes_an_answer_out_of_the_loss(flag, spelling, chat, made, answers):
    off = True if flag in OPPOSITES else False if flag in SWITCHES else 0
    rows = [SPELLINGS[spelling](talk({flag: off}, {flag: (not off) if flag not in NUMBERS else 1}))]
    prepared = made(rows, chat("chatml"))
    assert supervised(prepared, answers, chat("chatml")) == [("a1", 1.0)]


@QUIET
@given(weights=WEIGHTS, spelling=st.sampled_from(sorted(SPELLINGS)), name=st.sampled_from(NUMBERS))
def test_each_answer_counts_by_its_weight_whichever_others_there_are(weights, spelling, name, chat, made, answers):
    rows = [SPELLINGS[spelling](talk(*({name: weight} for weight in weights)))]
    expected = [(f"a{i}", 1.0 if w is None else float(w)) for i, w in enumerate(weights) if w != 0]
    if not expected:
        with pytest.raises(LuthierError) as caught:
            made(rows, chat("chatml"))
        assert caught.value.code == "data-unsupervised"
        return
    prepared = made(rows, chat("chatml"))
    assert supervised(prepared, answers, chat("chatml")) == sorted(expected)
    several = len({weight for _, weight in expected}) > 1
    assert prepared.report.changes == ({"weighted": 1} if several else {})
    assert len(prepared.train) == len({weight for _, weight in expected})


@pytest.mark.parametrize(
    "flags",
    [
        {"weight": 0, "train": True},
        {"weight": 1, "loss_mask": 0},
        {"train": True, "trainable": False},
        {"masked": True, "unmask": True},
        {"weight": 0.5, "loss_weight": 0.25},
    ],
)
def test_flags_that_contradict_each_other_are_an_error_with_the_message(flags, chat, made):
    with expect_error("data-row", "data[0]: messages[3]") as caught:
        made([{"messages": talk({}, flags)}], chat("chatml"))
    assert (caught.value.code, caught.value.where) == ("data-row", "data[0]: messages[3]")


def test_flags_that_say_the_same_are_one(chat, made, answers):
    flags = {"weight": 0.5, "train": True, "masked": False, "loss": 1, "loss_mask": None}
    prepared = made([{"messages": talk(flags)}], chat("chatml"))
    assert supervised(prepared, answers, chat("chatml")) == [("a0", 0.5)]


@pytest.mark.parametrize(
    ("name", "value"), [("weight", "high"), ("weight", float("nan")), ("train", "no"), ("loss_mask", 2)]
)
def test_a_flag_that_is_none_is_an_error_with_its_place(name, value, chat, made):
    with pytest.raises(LuthierError) as caught:
        made([{"messages": talk({name: value})}], chat("chatml"))
    assert (caught.value.code, caught.value.where) == ("data-row", f"data[0]: messages[1].{name}")


def test_a_flag_that_the_recipe_cannot_follow_is_refused(chat, made):
    asked = [{"role": "user", "content": "q", "train": True}, {"role": "assistant", "content": "a"}]
    with expect_error("data-row", "data[0]: message 1"):
        made([{"messages": asked}], chat("chatml"))
    assert made([{"messages": asked}], chat("chatml"), train_on="all").report.supervised_share > 0.9
    with expect_error("data-row", "data[0]: message 2", "train_on"):
        made([{"messages": talk({"train": False}, {})}], chat("chatml"), train_on="all")


def test_an_answer_of_the_prompt_is_supervised_where_its_flag_says_so(chat, made, answers):
    row = {"prompt": [*talk({"train": True}), {"role": "user", "content": "q"}], "completion": "b"}
    prepared = made([row], chat("chatml"))
    assert supervised(prepared, answers, chat("chatml")) == [("a0", 1.0), ("b", 1.0)]


@pytest.mark.parametrize(("side", "flag", "taken"), [("chosen", 1, True), ("chosen", 0, False), ("prompt", 0, True)])
def test_what_is_compared_is_supervised_whole_or_refused(side, flag, taken, chat, made):
    row = {"prompt": talk({})[:1], "chosen": talk({})[1:], "rejected": [{"role": "assistant", "content": "b"}]}
    row[side] = [{**row[side][0], "weight": flag}]
    if taken:
        assert len(made([row], chat("chatml"), wanted=Wanted(kind="preference")).train) == 1
        return
    with expect_error("data-row", "data[0]: chosen[0]"):
        made([row], chat("chatml"), wanted=Wanted(kind="preference"))


@QUIET
@given(trained=st.lists(st.booleans(), min_size=1, max_size=4))
def test_train_on_last_supervises_the_last_answer_that_the_row_trains(trained, chat, made, answers):
    rows = [{"messages": talk(*({"train": on} for on in trained))}]
    if not any(trained):
        return
    prepared = made(rows, chat("chatml"), train_on="last")
    last = max(i for i, on in enumerate(trained) if on)
    assert supervised(prepared, answers, chat("chatml")) == [(f"a{last}", 1.0)]


def test_train_on_last_in_every_other_form(chat, made, answers):
    alpaca = {"instruction": "q", "output": "a1", "history": [["q", "a0"]]}
    tokens = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9]}
    documents = {"text": "ab"}
    assert supervised(made([alpaca], chat("chatml"), train_on="last"), answers, chat("chatml")) == [("a1", 1.0)]
    assert made([tokens], chat(None), train_on="last").train[0].labels.tolist() == [-100, -100, -100, 8, 9]
    whole, last = (made([documents], chat(None), train_on=which).train.fingerprint for which in ("assistant", "last"))
    assert whole == last
    long = [{"role": "user", "content": "q"}, *talk({}, {})]
    pair = {"chosen": [long[0], {"role": "assistant", "content": "x"}, *long[1:]], "rejected": [long[0], {"role": "assistant", "content": "y"}]}  # fmt: skip
    chosen = (
        made([pair], chat("chatml"), train_on="last", wanted=Wanted(kind="preference")).train[0].by_name()["chosen"]
    )
    assert answers(chosen, chat("chatml")) == ["a1<|im_end|>"]
