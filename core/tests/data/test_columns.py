"""Columns and templates of a source, and what happens when they do not fit the data."""

from __future__ import annotations

import pytest
from luthier import LuthierError
from luthier.data.read.sources import read_given
from luthier.recipe.schema import Source

ROWS = [{"question": "2 + 3?", "answer": "5", "id": 7, "text": "x"}]


def mapped(rows=ROWS, **options):
    return [row.whole.values for row in read_given(rows, "data", Source(path="rows", **options))]


def test_a_mapped_column_takes_our_name_and_the_others_stay():
    assert mapped(columns={"prompt": "question", "completion": "answer"}) == [
        {"prompt": "2 + 3?", "completion": "5", "id": 7, "text": "x"}
    ]


def test_one_column_may_stand_for_two_of_ours_and_names_may_be_swapped():
    assert mapped(columns={"prompt": "text", "completion": "text"})[0]["prompt"] == "x"
    assert mapped([{"prompt": "a", "completion": "b"}], columns={"prompt": "completion", "completion": "prompt"}) == [
        {"prompt": "b", "completion": "a"}
    ]


def test_a_template_wraps_fields_of_the_row():
    template = {"prompt": "Q{id}: {question}\nA:", "completion": " {answer} {{done}}"}
    assert mapped(template=template)[0] | {"text": ""} == {
        **ROWS[0],
        "prompt": "Q7: 2 + 3?\nA:",
        "completion": " 5 {done}",
        "text": "",
    }


def test_a_template_may_use_columns_by_their_name_in_the_data_and_by_ours():
    options = {"columns": {"prompt": "question"}, "template": {"completion": "{prompt} {question} {answer}"}}
    assert mapped(**options)[0]["completion"] == "2 + 3? 2 + 3? 5"


def test_a_field_in_a_value_is_not_filled_in_again():
    assert mapped([{"a": "{b}", "b": "no"}], template={"text": "{a}"})[0]["text"] == "{b}"


def test_values_that_are_no_text_are_written_as_json_and_nothing_as_nothing():
    row = {"list": ["é", 1], "true": True, "none": None}
    assert mapped([row], template={"text": "{list} {true} {none}."})[0]["text"] == '["é", 1] true .'


@pytest.mark.parametrize("options", [{"columns": {"prompt": "qestion"}}, {"template": {"prompt": "Q: {qestion}"}}])
def test_an_unknown_column_is_an_error_with_the_nearest_and_those_present(options):
    with pytest.raises(LuthierError) as caught:
        mapped(**options)
    assert caught.value.code == "data-column" and caught.value.where == "data[0]"
    assert "'question'" in caught.value.remedy and "answer, id, question, text" in caught.value.remedy


@pytest.mark.parametrize(
    "text", ["{question.__class__}", "{question[0]}", "{id:05d}", "{id!r}", "{}", "{", "}", "{a{b}}"]
)
def test_a_template_with_more_than_plain_fields_is_refused(text):
    with pytest.raises(LuthierError) as caught:
        mapped(template={"prompt": text})
    assert caught.value.code == "recipe-wrong-type" and caught.value.where == "template.prompt"
