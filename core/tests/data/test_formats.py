"""Recognising formats, converting their rows, and the reasons given for rows that are broken."""

from __future__ import annotations

import json

import pytest
from luthier import LuthierError
from luthier.data.formats.forms import Completion, Conversation, Document, Instruction, Tokens
from luthier.data.formats.recognise_form import convert_row, recognise_format
from luthier.data.read.row import Row
from luthier.testing import expect_error

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CHATML = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
SAMPLES = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": "1"},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "chatml": {"text": CHATML},
    "text": {"text": "a"},
    "tokens": {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "len": 3},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
}


def rows_of(*values):
    return [Row(value, f"a.jsonl:{i}") for i, value in enumerate(values, 1)]


def convert(values, form):
    return convert_row(Row(values, "a.jsonl:7"), form)


@pytest.mark.parametrize("form", SAMPLES)
def test_each_format_is_recognised_by_its_columns(form):
    assert recognise_format(rows_of(*[SAMPLES[form]] * 3), "a.jsonl") == form


@pytest.mark.parametrize("messages", [
    CHAT, CHAT[:1], CHAT[1:], [{"content": "s", "role": "system"}, *CHAT, *CHAT], [{"role": "tool", "content": ""}],
    [{"role": "developer", "content": "é"}, *CHAT], [{**CHAT[0], "name": "Ann"}, CHAT[1]], [{"role": "user", "content": ["a"]}],
    [{"role": "nobody", "content": "a"}], [{"role": "user", "text": "a"}], [{"role": "user", "content": None}], [], [5], {}, None,
])  # fmt: skip
def test_a_row_of_plain_messages_is_read_as_any_other(messages):
    """A column that nothing reads sends the row the general way."""
    results = []
    for further in ({}, {"id": 1}):
        try:
            results.append(convert({"messages": messages, **further}, "messages"))
        except LuthierError as error:
            results.append(error.line)
    assert results[0] == results[1]


def test_an_alpaca_row_may_say_response_for_output():
    assert recognise_format(rows_of({"instruction": "a", "response": "b"}), "a.jsonl") == "alpaca"
    assert convert({"instruction": "a", "response": "b"}, "alpaca") == Instruction(
        instruction="a", input="", output="b", where="a.jsonl:7"
    )


@pytest.mark.parametrize(("other", "fits"), [(5, True), (6, False)])
def test_a_format_must_fit_95_of_the_first_100_rows(other, fits):
    rows = rows_of(*[{"other": 1}] * other, *[SAMPLES["text"]] * (100 - other), *[{"other": 1}] * 900)
    if fits:
        assert recognise_format(rows, "a.jsonl") == "text"
        return
    with expect_error("data-format", "a.jsonl", "94", "100", "a.jsonl:1") as caught:
        recognise_format(rows, "a.jsonl")
    assert caught.value.code == "data-format"


def test_rows_that_fit_two_formats_are_an_error_that_names_both_with_counts():
    with pytest.raises(LuthierError, match=r"alpaca \(2 of 2\), text \(2 of 2\)") as caught:
        recognise_format(rows_of(*[{**SAMPLES["alpaca"], "text": "x"}] * 2), "a.jsonl")
    assert caught.value.code == "data-format" and "data.format" in caught.value.remedy


def test_a_mapped_column_decides_between_two_formats():
    rows = rows_of({"prompt": "a", "completion": "b", "text": "c"})
    assert recognise_format(rows, "a.jsonl", {"prompt", "completion"}) == "prompt_completion"
    assert recognise_format(rows, "a.jsonl", {"text"}) == "text"


def test_rows_of_no_format_list_their_columns_and_advise_a_mapping():
    with pytest.raises(LuthierError) as caught:
        recognise_format(rows_of({"question": "a", "answer": "b"}), "a.jsonl")
    assert (caught.value.code, caught.value.where) == ("data-format", "a.jsonl")
    assert "answer" in caught.value.problem and "question" in caught.value.problem
    assert "{prompt: question, completion: answer}" in caught.value.remedy


def test_every_kind_of_conversation_becomes_the_same_one():
    wanted = Conversation(messages=tuple(CHAT), trained=(False, True), where="a.jsonl:7")
    for form in ("messages", "sharegpt", "chatml"):
        assert convert(SAMPLES[form], form) == wanted
    assert convert({"prompt": [CHAT[0]], "completion": "b"}, "prompt_completion") == wanted
    assert convert({"prompt": "a", "completion": [CHAT[1]]}, "prompt_completion") == wanted


def test_documents_and_completions_keep_their_text_as_it_is():
    assert convert({"text": " a\n"}, "text") == Document(text=" a\n", where="a.jsonl:7")
    form = convert({"prompt": "a ", "completion": " b"}, "prompt_completion")
    assert form == Completion(prompt="a ", completion=" b", where="a.jsonl:7")


def test_input_ids_alone_are_a_document():
    assert convert({"input_ids": [1, 2]}, "tokens") == Tokens(input_ids=[1, 2], labels=[1, 2], where="a.jsonl:7")


def test_padding_named_by_the_attention_mask_is_removed():
    row = {"input_ids": [0, 5, 6, 0], "labels": [-100, 5, 6, -100], "attention_mask": [0, 1, 1, 0]}
    assert convert(row, "tokens") == Tokens(input_ids=[5, 6], labels=[5, 6], where="a.jsonl:7")


def test_messages_of_a_prompt_are_context_even_the_assistants():
    form = convert({"prompt": [*CHAT, CHAT[0]], "completion": [CHAT[1]]}, "prompt_completion")
    assert form.trained == (False, False, False, True)


def test_text_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    form = convert({"messages": [CHAT[0], {"role": "assistant", "content": parts}]}, "messages")
    assert form.messages[1]["content"] == "bc"


def test_tool_calls_are_read_alike_from_openai_and_sharegpt():
    call = {"name": "add", "arguments": {"a": 1}}
    schema = {"name": "add", "parameters": {}}
    text = {"function": {"name": "add", "arguments": '{"a": 1}'}, "type": "function"}
    openai = {
        "messages": [
            CHAT[0],
            {"role": "assistant", "content": None, "tool_calls": [text]},
            {"role": "tool", "content": "2"},
            CHAT[1],
        ],
        "tools": [{"type": "function", "function": schema}],
    }
    old = {
        "messages": [
            CHAT[0],
            {"role": "assistant", "content": None, "function_call": text["function"]},
            {"role": "function", "content": "2"},
            CHAT[1],
        ],
        "functions": [schema],
    }
    turns = [("human", "a"), ("function_call", json.dumps(call)), ("observation", "2"), ("gpt", "b")]
    sharegpt = {"conversations": [{"from": f, "value": v} for f, v in turns], "tools": json.dumps([schema])}
    wanted = convert(openai, "messages")
    assert wanted.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert wanted.trained == (False, True, False, True)
    assert convert(old, "messages") == convert(sharegpt, "sharegpt") == wanted


def test_a_system_text_beside_the_turns_comes_first():
    form = convert({**SAMPLES["sharegpt"], "system": "Be brief."}, "sharegpt")
    assert form.messages[0] == {"role": "system", "content": "Be brief."}


BROKEN = [
    ("messages", {"messages": []}, "messages", ("a.jsonl:7: messages",)),
    ("messages", {"messages": "a"}, "messages", ("expected a list",)),
    ("messages", {"messages": [CHAT[0], 5]}, "messages[1]", ("a.jsonl:7: messages[1]",)),
    ("messages", {"messages": [{"role": "asistant", "content": "a"}]}, "messages[0].role", ("a.jsonl:7: messages[0].role", "'assistant'")),
    ("messages", {"messages": [{"content": "a"}]}, "messages[0].role", ("Known: system",)),
    ("messages", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", ("a.jsonl:7: messages[0].content",)),
    ("messages", {"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", ("a.jsonl:7: messages[0].content",)),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", ("a.jsonl:7: messages[0].content[0]",)),
    ("messages", {"messages": [{"role": "user", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]}, "messages[0]", ("a.jsonl:7: messages[0]",)),
    ("messages", {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages[0].tool_calls[0]", ("a.jsonl:7: messages[0].tool_calls[0]",)),
    ("messages", {"messages": [{**CHAT[1], "weight": -0.5}]}, "messages[0].weight", ("a.jsonl:7: messages[0].weight",)),
    ("messages", {"messages": CHAT, "tools": "{"}, "tools", ("a.jsonl:7: tools", "JSON")),
    ("messages", {"messages": CHAT, "tools": [{"name": "f"}, 5]}, "tools[1]", ("a.jsonl:7: tools[1]",)),
    ("sharegpt", {"conversations": [{"from": "humen", "value": "a"}]}, "conversations[0].from", ("a.jsonl:7: conversations[0].from", "'human'")),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": None}]}, "conversations[0].value", ("a.jsonl:7: conversations[0].value",)),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "f()"}]}, "conversations[0].value", ("a.jsonl:7: conversations[0].value", "JSON")),
    ("alpaca", {"instruction": "a", "output": 5}, "", ("a.jsonl:7",)),
    ("prompt_completion", {"prompt": "a"}, "", ("a.jsonl:7",)),
    ("prompt_completion", {"prompt": "a", "completion": float("nan")}, "", ("a.jsonl:7",)),
    ("chatml", {"text": CHATML + "<|im_start|>user\nopen"}, "text", ("a.jsonl:7: text",)),
    ("chatml", {"text": "before " + CHATML}, "text", ("a.jsonl:7: text",)),
    ("text", {"text": None}, "", ("a.jsonl:7",)),
    ("tokens", {"input_ids": []}, "input_ids", ("a.jsonl:7: input_ids",)),
    ("tokens", {"input_ids": [1, 2.0]}, "input_ids[1]", ("a.jsonl:7: input_ids[1]",)),
    ("tokens", {"input_ids": [1, True]}, "input_ids[1]", ("a.jsonl:7: input_ids[1]",)),
    ("tokens", {"input_ids": [1, 2], "labels": [1]}, "labels", ("a.jsonl:7: labels",)),
    ("tokens", {"input_ids": [1, 2], "len": 3}, "len", ("a.jsonl:7: len",)),
    ("tokens", {"input_ids": [1, 2], "labels": [-1, 2]}, "labels", ("a.jsonl:7: labels", "-100")),
    ("tokens", {"input_ids": [5, 6, 7, 8], "labels": [6, 7, 8, -100]}, "labels", ("a.jsonl:7: labels",)),
    ("preference", {"chosen": "a"}, "rejected", ("a.jsonl:7: rejected",)),
    ("preference", {"chosen": True, "rejected": "b"}, "chosen", ("a.jsonl:7: chosen",)),
    ("preference", {"chosen": [CHAT[0]], "rejected": CHAT}, "chosen", ("a.jsonl:7: chosen",)),
]  # fmt: skip


@pytest.mark.parametrize(("form", "values", "place", "words"), BROKEN)
def test_a_broken_row_is_an_error_with_its_place_and_reason(form, values, place, words):
    with pytest.raises(LuthierError) as caught:
        convert(values, form)
    assert caught.value.code == "data-row" and all(fact in str(caught.value) for fact in words)
    assert caught.value.where == "a.jsonl:7" + (f": {place}" if place else "")


@pytest.mark.parametrize("ids", [[1, -1], [1, 2**31], [2**70]])
def test_ids_that_no_vocabulary_has_are_refused(ids):
    with pytest.raises(LuthierError) as caught:
        convert({"input_ids": ids}, "tokens")
    assert (caught.value.code, caught.value.where) == ("model-vocabulary", "a.jsonl:7: input_ids")
    assert caught.value.found == ids[-1]


def test_equal_neighbours_are_not_taken_for_shifted_labels():
    assert convert({"input_ids": [5, 5, 5], "labels": [5, 5, -100]}, "tokens").labels == [5, 5, -100]


@pytest.mark.parametrize(("column", "turns"), [
    ("messages", [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]),
    ("conversations", [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]),
])  # fmt: skip
def test_a_conversation_that_a_table_wrote_as_json_is_the_conversation(column, turns, chat, made):
    rows = [{column: turns}, {column: json.dumps(turns)}]
    as_list, as_text = (made([row], chat("chatml")).train[0] for row in rows)
    assert as_list.input_ids.tolist() == as_text.input_ids.tolist() and (as_list.labels == as_text.labels).all()


@pytest.mark.parametrize("text", ["hello", "[1", "[]", '{"role": "user"}', "[" * 20_000])
def test_a_text_that_is_no_list_of_messages_is_a_broken_row(text, chat, made):
    with expect_error("data-row", "data[0]: messages"):
        made([{"messages": text}], chat("chatml"))
