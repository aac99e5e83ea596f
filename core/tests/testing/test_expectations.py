"""What tests are written with: an error that is expected by code and place, and one that is raised inside real code."""

import functools
import sys

import pytest
from luthier import LuthierError
from luthier.testing import expect_error, raise_inside


def refuse(where="folder/rows.jsonl:3"):
    raise LuthierError("data-row", "not JSON", where=where, found="{", remedy="Correct the row.")


@pytest.mark.parametrize("where", ["folder/rows.jsonl:3", "rows.jsonl:3", ":3"])
def test_an_error_is_expected_by_its_code_and_the_end_of_its_place(where):
    with expect_error("data-row", where) as caught:
        refuse()
    assert caught.value.found == "{"


def test_facts_are_looked_for_in_the_whole_text():
    with expect_error("data-row", ":3", "JSON", "'{'", "Correct"):
        refuse()
    with pytest.raises(AssertionError, match="CSV"), expect_error("data-row", ":3", "JSON", "CSV"):
        refuse()


def test_an_error_without_a_place_is_expected_without_one():
    with expect_error("data-row") as caught:
        refuse(where=None)
    assert caught.value.where is None


@pytest.mark.parametrize(("code", "where"), [("data-empty", ":3"), ("data-row", ":4"), ("data-row", None)])
def test_another_code_or_place_is_a_failure_that_shows_both(code, where):
    with pytest.raises(AssertionError, match=r"got 'data-row' at 'folder/rows.jsonl:3'"), expect_error(code, where):
        refuse()


def test_a_block_without_an_error_fails_and_other_exceptions_pass():
    with pytest.raises(AssertionError), expect_error("data-row", ":3"):
        pass
    with pytest.raises(KeyError), expect_error("data-row", ":3"):
        raise KeyError("rows")


def double(number):
    return 2 * number


@functools.wraps(double)
def wrapped(number):
    return double(number)


@pytest.mark.parametrize("function", [double, wrapped])
def test_an_error_comes_once_at_the_call_that_is_meant(function):
    calls, before = [], sys.gettrace()
    with raise_inside(function, OSError("disk"), lambda frame: frame.f_locals["number"] == 3):
        for number in (1, 3, 3):
            try:
                calls.append(double(number))
            except OSError:
                calls.append(None)
    assert calls == [2, None, 6] and sys.gettrace() is before


def test_a_call_that_never_comes_is_a_failure():
    with pytest.raises(AssertionError), raise_inside(double, OSError("disk")):
        pass


def test_an_error_before_the_function_is_the_one_that_is_seen():
    with pytest.raises(ValueError, match="the real failure"), raise_inside(double, OSError("disk")):
        raise ValueError("the real failure")


def test_a_place_is_met_by_whole_words_alone():
    with pytest.raises(AssertionError), expect_error("usage", "lr"):
        raise LuthierError("usage", "no", where="adapter.xlr")
    with expect_error("usage", "lr"):
        raise LuthierError("usage", "no", where="adapter.lr")
