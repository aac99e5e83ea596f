"""Nothing of a row is left out unsaid: templates of many habits, against an oracle that replaces each text."""

from __future__ import annotations

import ast
import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.tokenise.encode import Encoder
from luthier.testing import expect_error

QUIET = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
HABITS = {  # each like a family of public templates, written for these tests
    "all as it comes": TOOLS + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + CALLS
    + "<|im_end|>\n{% endfor %}" + ASKED,
    "system for the last user": "{% for m in messages %}{% if m.role == 'user' %}[Q]{% if loop.last and "
    "messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/Q]"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    "known roles alone": "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}" + TURN
    + "{% endif %}{% endfor %}" + ASKED,
    "the first system alone": "{% for m in messages %}{% if m.role != 'system' or loop.first %}" + TURN
    + "{% endif %}{% endfor %}" + ASKED,
    "no system": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + TURN + "{% endfor %}" + ASKED,
    "thoughts by key, past ones stripped": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}" + CALLS + "<|im_end|>\n{% endfor %}" + ASKED,
    "thoughts opened by the prompt and never written": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "thoughts never": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>\n{% endfor %}" + ASKED,
    "an empty thought in the prompt": "{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<none>{% endif %}",
    "trimmed and escaped": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ m.content | trim }}{% else %}{{ m.content | trim | tojson }}{% endif %}" + CALLS + "<|im_end|>\n{% endfor %}" + ASKED,
}  # fmt: skip
SAID = st.sampled_from(["hi", "a", "Answer in rhyme.", 'say "so"\nor not', "assistant", " two  words "])
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}


@st.composite
def conversations(draw):
    """System, developer, questions, answers with thoughts and calls, tool answers, and a later system message."""
    messages = [{"role": draw(st.sampled_from(["system", "developer"])), "content": draw(SAID)}] * draw(st.booleans())
    calls = draw(st.booleans())
    for turn in range(draw(st.integers(1, 2))):
        if turn and draw(st.booleans()):
            messages = [*messages, {"role": "system", "content": draw(SAID)}]
        messages = [*messages, {"role": "user", "content": draw(SAID)}]
        if calls and draw(st.booleans()):
            call = {"type": "function", "function": {"name": "look", "arguments": {"at": draw(SAID)}}}
            messages += [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": draw(SAID)},
            ]
        thought = {"reasoning_content": draw(SAID)} if draw(st.booleans()) else {}
        messages = [*messages, {"role": "assistant", "content": draw(SAID), **thought}]
    return {"messages": messages, **({"tools": [TOOL]} if calls else {})}


def others(row):
    """The row once for each of its texts, with another in its place; and what that is counted as."""
    for i, message in enumerate(row["messages"]):
        for key, role in (("content", message["role"]), ("reasoning_content", "thought")):
            if message.get(key, "").strip():
                yield role, i, changed(row, i, lambda m, key=key: m.update({key: "something else"}))
        for call in message.get("tool_calls", ()):
            assert call["function"]["arguments"]
            new = {"function": {"name": "look", "arguments": {"other": "else"}}}
            yield "tool_calls", i, changed(row, i, lambda m, new=new: m.update(tool_calls=[new]))
    if "tools" in row:
        function = {"name": "other", "description": "Else.", "parameters": {"type": "object"}}
        yield "tools", -1, {**row, "tools": [{"type": "function", "function": function}]}


def changed(row, index, change):
    row = copy.deepcopy(row)
    change(row["messages"][index])
    return row


@pytest.mark.parametrize("habit", HABITS)
@QUIET
@given(row=conversations())
def test_what_changes_no_example_is_told_and_nothing_else(habit, row, chat, made):
    def texts(given_row):
        prepared = made([given_row], tokenizer, chat_template=HABITS[habit], unrendered="warn")
        return [example.input_ids.tolist() for example in prepared.train], prepared.report

    tokenizer = chat("chatml")
    try:
        own, report = texts(row)
    except LuthierError as error:
        assert error.code in ("data-row", "template-unprovable")
        return
    last = len(row["messages"]) - 1
    lost = {role for role, i, other in others(row) if unchanged(texts, other, own) and (role != "thought" or i == last)}
    told = {role for role in report.unrendered if role not in ("prompt", "thought")}
    assert told == lost - {"thought"}
    assert lost <= {*report.unrendered}
    if report.unrendered:
        with pytest.raises(LuthierError) as caught:
            made([row], tokenizer, chat_template=HABITS[habit])
        assert caught.value.code == "data-unrendered"
        assert ast.literal_eval(repr(caught.value.found)) == dict(report.unrendered)


def unchanged(texts, row, own):
    try:
        return texts(row)[0] == own
    except LuthierError:
        return False


@pytest.mark.parametrize("habit", HABITS)
def test_answers_stand_behind_the_prompt_that_generation_is_given(habit, chat, made):
    tokenizer, asked = chat("chatml"), {"role": "user", "content": "Q"}
    rows = [[asked, {"role": "assistant", "content": "A"}]]
    if habit != "no system":
        rows.append([{"role": "system", "content": "SYS"}, *rows[0], asked, {"role": "assistant", "content": "B"}])
    for messages in rows:
        train = made([{"messages": messages}], tokenizer, chat_template=HABITS[habit]).train
        held = [example.input_ids.tolist() for example in train]
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            prompt = tokenizer.apply_chat_template(
                messages[:i], chat_template=HABITS[habit], add_generation_prompt=True, tokenize=False
            )
            ids = Encoder.of(tokenizer).prompt(prompt)
            assert any(own[: len(ids)] == ids for own in held)


SPELLED = {
    "under a key": {"content": "4", "reasoning_content": "two and two"},
    "under another key": {"content": "4", "thinking": "two and two"},
    "twice": {"content": "<think>two and two</think>4", "reasoning": "two and two"},
    "in a block": {"content": "<think>two and two</think>4"},
    "in a block of lines": {"content": "<think>\ntwo and two\n</think>\n\n4"},
}


@pytest.mark.parametrize("habit", [habit for habit in HABITS if habit != "thoughts never"])
def test_one_thought_gives_one_result_however_it_is_spelled(habit, chat, made, answers):
    asked = {"role": "user", "content": "2+2"}
    rows = [{"messages": [asked, {"role": "assistant", **own}]} for own in SPELLED.values()]
    if habit == "an empty thought in the prompt":  # which the row's own contradicts
        with expect_error("data-unrendered", "data[0]"):
            made(rows, chat("chatml"), chat_template=HABITS[habit])
        return
    train = made(rows, chat("chatml"), chat_template=HABITS[habit]).train
    found = {tuple(answers(example, chat("chatml"))) for example in train}
    assert len(found) == 1 and found.pop()[0].removeprefix("<think>\n") == "two and two\n</think>\n\n4<|im_end|>"


def test_an_opened_thought_is_closed_where_the_row_has_none(chat, made, answers):
    template = HABITS["thoughts opened by the prompt and never written"]
    row = {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}
    example = made([row], chat("chatml"), chat_template=template).train[0]
    assert answers(example, chat("chatml")) == ["\n</think>\n\n4<|im_end|>"]
    assert "assistant\n<think>\n\n</think>" in chat("chatml").decode(example.input_ids)


def test_what_is_left_out_is_counted_by_role_over_all_rows(chat, made):
    rows = [
        {"messages": [{"role": role, "content": f"S{i}"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
        for i, role in enumerate(["system", "developer", "developer"])
    ]  # fmt: skip
    report = made(rows, chat("chatml"), chat_template=HABITS["known roles alone"], unrendered="warn").report
    assert report.unrendered == {"developer": 2} and report.to_dict()["unrendered"] == {"developer": 2}
    assert report.warnings == ["2 of 3 rows (66.7 %) hold what the chat template does not write: developer 2"]
    with expect_error("data-unrendered", "data[1]", "2", "3", "messages[0]", "developer"):
        made(rows, chat("chatml"), chat_template=HABITS["known roles alone"])


def test_messages_after_the_last_answer_that_no_example_has_are_told(chat, made):
    thought = {"role": "assistant", "content": "A", "reasoning_content": "hm"}
    row = {"messages": [{"role": "user", "content": "Q"}, thought, {"role": "user", "content": "thanks"}]}
    report = made([row], chat("chatml"), chat_template=HABITS["thoughts by key, past ones stripped"]).report
    assert report.changes == {"trailing": 1} and not report.unrendered
