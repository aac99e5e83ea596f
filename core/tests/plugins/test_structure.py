"""Strict structuring: what is taken as it is, what is read as meant, and what is refused where cattrs would convert."""

import enum
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Union  # the older spellings are read too

import attrs
import cattrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError, option
from luthier.plugins.structure import Written, bare_value, structure_value
from luthier.testing import expect_error


class Colour(enum.Enum):
    RED = "red"
    ONE = 1


@attrs.frozen(kw_only=True)
class Inner:
    depth: int = option(1, help="Depth.", low=1)


@attrs.frozen(kw_only=True)
class Outer:
    inner: Inner = option(factory=Inner, help="Nested.")
    many: list[Inner] = option(factory=list, help="List.")
    needed: str = option(help="Required.")

    def __attrs_post_init__(self):
        if self.needed == "own":
            raise LuthierError("recipe-conflict", "own check", where="Outer.needed")
        if self.needed == "value":
            raise ValueError("not this")


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3), (3, float, 3.0), ("2e-4", float, 2e-4), ("-1.5", float, -1.5), ("inf", float, float("inf")), (True, bool, True), ("x", str, "x"),
        (None, type(None), None), ("a/b", Path, Path("a/b")), (Path("a"), Path, Path("a")),
        ("red", Colour, Colour.RED), (1, Colour, Colour.ONE), (Colour.RED, Colour, Colour.RED),
        ([1, 2], list[int], [1, 2]), ((1, 2), list[int], [1, 2]), ([1, 2], tuple[int, ...], (1, 2)),
        ([1, "a"], tuple[int, str], (1, "a")), ([], tuple[int, ...], ()), ([1, 2], frozenset[int], frozenset({1, 2})),
        ({2, 1}, set[int], {1, 2}), (["a"], Sequence[str], ["a"]), ({"a": 1}, Mapping[str, int], {"a": 1}),
        ({"a": 1}, dict[str, float], {"a": 1.0}), ({"a": [1]}, dict[str, Any], {"a": [1]}), ([1], list, [1]),
        (None, int | None, None), (3, int | None, 3), ("none", int | None, None), ("none", float | None, None),
        ("none", str | None, "none"), ("none", Literal["none"] | None, "none"), (3, Optional[int], 3),  # noqa: UP045
        (3, Union[str, int], 3), ("3", str | int, "3"), ("3", int | str, "3"), (True, int | bool, True),  # noqa: UP007
        (True, bool | float, True), (1, bool | int, 1), (1, float | str, 1.0), ("a", Literal["a", 1], "a"),
        (1, Literal["a", 1], 1), ([1], int | list[int], [1]), ("auto", int | Literal["auto"], "auto"),
        ("x", Any, "x"), (0.5, float | list[Inner], 0.5), ([{"depth": 2}], float | list[Inner], [Inner(depth=2)]),
        ({"depth": 2}, Inner, Inner(depth=2)), (Inner(depth=3), Inner, Inner(depth=3)), ({}, Inner, Inner()),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_meant_is_taken(value, hint, expected):
    found = structure_value(value, hint, "x")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "says"),
    [
        ("16", int, "x: expected int (found '16')"),
        (16.7, int, "x: expected int (found 16.7)"),
        (16.0, int, "x: expected int (found 16.0)"),
        (True, int, "x: expected int (found True)"),
        (True, float, "x: expected float (found True)"),
        ("fast", float, "x: expected float (found 'fast')"),
        ("1_000", float, "x: expected float"),
        ("infinity", float, "x: expected float"),
        (float("nan"), float, "x: expected float (found nan)"),
        (10**400, float, "x: expected float"),
        ("false", bool, "x: expected bool (found 'false')"),
        (0, bool, "x: expected bool (found 0)"),
        (3, str, "x: expected str (found 3)"),
        (None, str, "x: expected str, and nothing is given"),
        (0, type(None), "x: expected none (found 0)"),
        ("blue", Colour, "x: expected 'red' | 1 (found 'blue')"),
        (True, Colour, "x: expected 'red' | 1 (found True)"),
        ("abc", list[str], "x: expected a list (found 'abc')"),
        ("a", Literal["b", "c"] | list[Literal["a"]], "x: expected 'b' | 'c' | list['a'] (found 'a')"),
        ("abc", frozenset[str], "x: expected a list (found 'abc')"),
        ({"a": 1}, list[str], "x: expected a list"),
        ([1, "2"], list[int], "x.1: expected int (found '2')"),
        ([[1], ["a"]], list[list[int]], "x.1.0: expected int (found 'a')"),
        ([1], tuple[int, int], "x: expected a list of 2 (found [1])"),
        ([1, 2], tuple[int], "x: expected a list of 1"),
        ([1], dict[str, int], "x: expected a mapping"),
        ({"a": "b"}, dict[str, int], "x.a: expected int (found 'b')"),
        ({1: 1}, dict[str, int], "x.1: expected str (found 1)"),
        ("x", int | None, "x: expected int | none (found 'x')"),
        ("1", int | bool, "x: expected int | bool (found '1')"),
        (True, Literal[1, 0], "x: expected 1 | 0 (found True)"),
        (1, Literal[True], "x: expected True (found 1)"),
        ("x", int | list[int], "x: expected int | list[int] (found 'x')"),
        (["x"], int | list[int], "x.0: expected int (found 'x')"),
        (3, Inner, "x: expected a mapping of Inner's options (found 3)"),
        ({"depth": "2"}, Inner, "x.depth: expected int (found '2')"),
        ({"depth": 0}, Inner, "x.depth: outside its bounds (found 0). Give a number of at least 1."),
        ({"dept": 2}, Inner, "x.dept: there is no such option. Did you mean 'depth'?"),
        ({3: 2}, Inner, "x.3: there is no such option. Known: depth."),
        ({}, Outer, "x.needed: is required"),
        ({"needed": "a", "inner": {"depth": None}}, Outer, "x.inner.depth: expected int, and nothing is given"),
        ({"needed": "a", "many": [{}, {"depth": -1}]}, Outer, "x.many.1.depth: outside its bounds (found -1)"),
        ({"needed": "own"}, Outer, "x.needed: own check"),
        ({"needed": "value"}, Outer, "x: refused by Outer: not this"),
    ],
    ids=str,
)  # fmt: skip
def test_what_would_be_converted_is_refused_at_its_place(value, hint, says):
    with pytest.raises(LuthierError) as caught:
        structure_value(value, hint, "x")
    assert str(caught.value).startswith(says)


@settings(max_examples=200, deadline=None)
@given(
    value=st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    hint=st.sampled_from([int, float, bool, str]),
)
def test_a_scalar_is_taken_exactly_when_its_type_is_the_options(value, hint):
    """cattrs alone makes 16 of '16' and of 16.7, and True of 'false': nothing of this is done here."""
    exact = type(value) is hint and value == value
    try:
        found = structure_value(value, hint, "x")
    except LuthierError:
        assert not exact
    else:
        assert exact or (hint is float and type(value) in (int, str))
        assert type(found) is hint
        assert found == cattrs.structure(value, hint)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
        max_leaves=8,
    )
)
def test_any_is_any(value):
    assert structure_value(value, Any, "x") == value


@pytest.mark.parametrize(
    ("text", "value", "hint", "expected"),
    [
        ("16", 16, int, 16), ("16", 16, str, "16"), ("16", 16, str | None, "16"), ("16", 16, int | str, 16),
        ("null", None, str | None, None), ("true", True, Literal["true"], "true"), ("16", 16, Any, 16),
        ("16", 16, Path, Path("16")), ("1e-4", 1e-4, float, 1e-4), ("a: b", {"a": "b"}, str, "a: b"),
        ("a: b", {"a": "b"}, dict[str, str], {"a": "b"}), ("[1]", [Written("1", 1)], list[str], ["1"]),
        ("[1]", [Written("1", 1)], list[int], [1]), ("[1]", [Written("1", 1)], Any, [1]),
    ],
    ids=str,
)  # fmt: skip
def test_the_type_decides_how_a_written_value_is_read(text, value, hint, expected):
    assert structure_value(Written(text, value), hint, "x") == expected


def test_a_written_value_is_shown_as_it_is_read():
    with expect_error("recipe-wrong-type", "x", "[1, 'a']"):
        structure_value(Written("[1, a]", [Written("1", 1), "a"]), bool, "x")
    assert bare_value({"a": Written("[1]", [Written("1", 1)])}) == {"a": [1]}
