"""Rows as other tools write them: whatever the spelling, a row gives what its author meant, or an error with the place."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from luthier import LuthierError

SCHEMA = {"type": "function", "function": {"name": "weather", "description": "QZX", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
ASKED = {"role": "user", "content": "q"}
TALK = {"messages": [ASKED, {"role": "assistant", "content": "sky"}]}


def said(content="sky", **keys):
    return {"messages": [ASKED, {"role": "assistant", "content": content, **keys}]}


def two(**flags):
    return {"messages": [ASKED, {"role": "assistant", "content": "BAD", **flags}, ASKED, said()["messages"][1]]}


def asked(content):
    return {"messages": [{"role": "user", "content": content}, said()["messages"][1]]}


def called(calls):
    return {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": calls}]}


def turns(history):
    return {"instruction": "now", "output": "sky", "history": history}


ANSWERS = {  # rows, and the answers that they train
    "a call": (called([CALL]), [WRITTEN]),
    "a call that stands alone": (called(CALL), [WRITTEN]),
    "a call without its wrapping": (called([CALL["function"]]), [WRITTEN]),
    "calls as text": (called(json.dumps([CALL])), [WRITTEN]),
    "a call as text": (called(json.dumps(CALL)), [WRITTEN]),
    "a call with its arguments as text": (
        called([{"function": {**CALL["function"], "arguments": '{"city": "Oslo"}'}}]), [WRITTEN]
    ),
    "an old call": (said(None, function_call=CALL["function"]), [WRITTEN]),
    "no calls": (said(tool_calls=None), ["sky"]),
    "no calls as text": (said(tool_calls="[]"), ["sky"]),
    "null calls as text": (said(tool_calls="null"), ["sky"]),
    "an empty text of calls": (said(tool_calls=""), ["sky"]),
    "a number of numpy as a weight": (two(weight=np.float32(0)), ["sky"]),
    "a truth value of numpy": (two(loss_mask=np.bool_(False)), ["sky"]),
    "a mask that says nothing": (two(mask=None), ["BAD", "sky"]),
    "no detail": (two(train_detail=[]), ["BAD", "sky"]),
    "history": (turns([["q1", "a1"]]), ["a1", "sky"]),
    "history as text": (turns('[["q1", "a1"]]'), ["a1", "sky"]),
    "history as an array": (turns(np.array([["q1", "a1"]])), ["a1", "sky"]),
    "no history": (turns(""), ["sky"]),
    "a part without a type": (asked([{"text": "hi"}]), ["sky"]),
    "a part with a null for its type": (asked([{"type": None, "text": "hi"}]), ["sky"]),
    "parts of the other interface": (asked([{"type": "input_text", "text": "hi"}]), ["sky"]),
    "an answer of the other interface": (said([{"type": "output_text", "text": "sky"}]), ["sky"]),
    "a part with a null for a picture": (asked([{"type": "text", "text": "hi", "image": None}]), ["sky"]),
    "a list of no picture": ({**TALK, "images": [None]}, ["sky"]),
    "an object of no picture": ({**TALK, "images": {"path": None, "bytes": None}}, ["sky"]),
    "settings as text": ({**TALK, "chat_template_kwargs": '{"x": 1}'}, ["sky"]),
    "masks of truth values": ({"input_ids": np.arange(70, 74), "loss_mask": np.array([0, 0, 1, 1], bool)}, None),
    "ids in a tuple": ({"input_ids": (70, 71, 72)}, None),
}  # fmt: skip
REFUSED = {  # rows, and the place that their error names
    "calls that are no JSON": (called("weather()"), "messages[1].tool_calls"),
    "a number of calls": (called(5), "messages[1].tool_calls"),
    "a call without a function": (called([{"type": "function", "function": None}]), "messages[1].tool_calls[0]"),
    "arguments in a list": (
        called([{"function": {"name": "w", "arguments": "[1]"}}]), "messages[1].tool_calls[0].arguments"
    ),
    "arguments after arguments": (
        called([{"function": {"name": "w", "arguments": '{"a": 1}{"b": 2}'}}]), "messages[1].tool_calls[0].arguments"
    ),
    "an argument given twice": (
        called([{"function": {"name": "w", "arguments": '{"a": 1, "a": 2}'}}]), "messages[1].tool_calls[0].arguments"
    ),
    "messages as text with a role given twice": ({"messages": '[{"role": "user", "role": "tool"}]'}, "messages"),
    "a tool as text with a name given twice": ({**TALK, "tools": ['{"name": "w", "name": "v"}']}, "tools"),
    "tools that are no JSON": ({**TALK, "tools": "["}, "tools"),
    "a tool among others that is none": ({**TALK, "tools": [SCHEMA, "x"]}, "tools[1]"),
    "a weight in a text": (two(weight="0"), "messages[1].weight"),
    "a flag in a text": (two(train="false"), "messages[1].train"),
    "a mask that may mean either": (two(mask=0), "messages[1].mask"),
    "parts of an answer": (two(train_detail=[{"begin_offset": 0}]), "messages[1].train_detail"),
    "a flag on a question": ({"messages": [{**ASKED, "weight": 1}, said()["messages"][1]]}, "message 1"),
    "history of objects": (turns([{"instruction": "q1", "output": "a1"}]), "history[0]"),
    "history of texts": (turns(["q1", "a1"]), "history[0]"),
    "history as prose": (turns("q1\na1"), "history"),
    "parts that are texts": (asked(["hi"]), "messages[0].content[0]"),
    "no parts": (asked([]), "messages[0].content"),
    "a picture beside a text": (
        asked([{"type": "text", "text": "hi", "image": "x.png"}]), "messages[0].content[0].image"
    ),
    "a picture as a part": (asked([{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content[0]"),
    "a picture in its bytes": ({**TALK, "image": {"bytes": b"x", "path": None}}, "image"),
    "settings in a list": ({**TALK, "chat_template_kwargs": [1]}, "chat_template_kwargs"),
    "settings of the conversation": ({**TALK, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    "ids that are texts": ({"input_ids": "[1, 2]"}, "input_ids"),
    "ids in two dimensions": ({"input_ids": np.ones((1, 3), int)}, "input_ids[0]"),
    "ids beyond every vocabulary": ({"input_ids": np.array([1, 2**63 + 1], np.uint64)}, "input_ids"),
    "a content that is a number": (asked(5), "messages[0].content"),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_a_row_of_another_tool_trains_the_answers_that_its_author_meant(name, chat, made, answers):
    row, expected = ANSWERS[name]
    tokenizer = chat("qwen")
    examples = made([row], tokenizer).train
    if expected is None:
        assert len(examples) == 1 and examples[0].num_supervised
        return
    texts = [text.strip().removesuffix("<|im_end|>") for one in examples for text in answers(one, tokenizer)]
    assert texts == expected


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_nobody_can_be_sure_of_is_an_error_with_the_place(name, chat, made):
    row, place = REFUSED[name]
    with pytest.raises(LuthierError) as caught:
        made([row], chat("qwen"))
    assert caught.value.code in ("data-row", "data-column", "model-vocabulary")
    assert caught.value.where == f"data[0]: {place}"


TOOLS = {
    "a list": [SCHEMA],
    "one": SCHEMA,
    "text": json.dumps([SCHEMA]),
    "one as text": json.dumps(SCHEMA),
    "a list of texts": [json.dumps(SCHEMA)],
    "a bare function": [SCHEMA["function"]],
}


@pytest.mark.parametrize("name", TOOLS)
def test_tools_are_read_however_they_are_wrapped(name, chat, made):
    prepared = made([{**TALK, "tools": TOOLS[name]}], chat("qwen"))
    assert "QZX" in chat("qwen").decode(prepared.train[0].input_ids)
    assert not any("tools" in remark for remark in prepared.report.warnings)


def test_an_empty_text_of_tools_is_no_tools_and_told_of_nowhere(chat, made):
    prepared = made([{**TALK, "tools": "[]"}], chat("qwen"))
    assert prepared.report.to_dict() == made([{**TALK, "tools": None}], chat("qwen")).report.to_dict()


def test_a_remedy_is_no_change_that_changes_nothing(chat, made):
    with pytest.raises(LuthierError) as caught:
        made([{"messages": [{**ASKED, "weight": 1}, said()["messages"][1]]}], chat("qwen"))
    assert "messages[" not in str(caught.value.remedy) and ": ." not in str(caught.value.remedy)


def conversation(number):
    said = [{"role": "assistant", "content": "a"}]
    return {"messages": [message for _ in range(number) for message in (ASKED, *said)]}


def test_a_conversation_of_thousands_of_messages_is_dropped_as_overlong_at_once(chat, made):
    before = time.process_time()
    prepared = made([conversation(4000), TALK], chat("chatml"))
    assert prepared.report.drops == {"overlong": 1} and len(prepared.train) == 1
    assert time.process_time() - before < 10  # it was ten minutes when each answer was found first


def test_a_conversation_of_more_messages_than_are_read_is_a_bad_row(chat, made):
    with pytest.raises(LuthierError) as caught:
        made([conversation(1025)], chat("chatml"), max_length=1 << 20)
    assert (caught.value.code, caught.value.where) == ("data-row", "data[0]: messages")


def test_a_long_conversation_that_the_template_refuses_is_told_with_its_place(chat, made, tmp_path):
    file = tmp_path / "refusing.jinja"
    file.write_text(
        "{% for m in messages %}{% if m.content == 'x' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    )
    bad = {"messages": [{"role": "user", "content": "x"}, *conversation(130)["messages"][1:]]}
    with pytest.raises(LuthierError) as caught:
        made([bad], chat("chatml"), chat_template=str(file))
    assert caught.value.code == "data-row" and caught.value.where.startswith("data[0]")


def test_a_long_conversation_that_fits_gives_all_of_its_answers(chat, made):
    prepared = made([conversation(130)], chat("chatml"), max_length=1 << 20)
    assert prepared.train[0].num_supervised == 130 * 2


def test_a_remark_names_some_of_thousands_of_columns(chat, made):
    row = {**TALK, **{f"column{number}": 1 for number in range(3000)}}
    assert all(len(remark) < 1000 for remark in made([row], chat("chatml")).report.warnings)
