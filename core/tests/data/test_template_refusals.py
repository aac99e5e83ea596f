"""Rows that a chat template does not carry: the message that is at fault is named, with a change that was tried."""

from __future__ import annotations

import pytest
from luthier.data.tokenise.chat_template import load_template
from luthier.data.tokenise.encode import Encoder
from luthier.testing import expect_error

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ALTERNATES = (
    "{% set own = messages | rejectattr('role', 'equalto', 'system') | list %}"
    "{% for m in own %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}"
)
HABITS = {  # each like a family of public templates, written for these tests
    "pictures": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + ASKED,
    "the first system alone": "{% for m in messages %}{% if m.role != 'system' or loop.first %}" + TURN
    + "{% endif %}{% endfor %}" + ASKED,
    "strict": "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('no question') }}"
    "{% endif %}{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}" + TURN + "{% endfor %}" + ASKED,
    "alternating": ALTERNATES + "{% for m in messages %}" + TURN + "{% endfor %}" + ASKED,
    "known roles alone": "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}" + TURN
    + "{% endif %}{% endfor %}" + ASKED,
    "thoughts by choice": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}{% else %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
    "thoughts never": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>\n{% endfor %}" + ASKED,
    "named answers": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'tool' %}{{ m.name + ': ' }}"
    "{% endif %}{{ m.content }}" + CALLS + "<|im_end|>\n{% endfor %}" + ASKED,
    "one call": "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}" + CALLS
    + "<|im_end|>\n{% endfor %}" + ASKED,
    "the first call alone": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}<call>"
    "{{ m.tool_calls[0].function | tojson }}</call>{% endif %}<|im_end|>\n{% endfor %}" + ASKED,
    "no tools": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + CALLS + "<|im_end|>\n{% endfor %}"
    + ASKED,
}  # fmt: skip
ASK, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM, DEVELOPER = {"role": "system", "content": "S"}, {"role": "developer", "content": "D"}
THINKING = {**ANSWER, "reasoning_content": "hm"}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}


def calling(*places):
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": place}}} for place in places]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def found(place):
    return {"role": "tool", "content": place}


REFUSED = [  # habit, messages, code, the message at fault, and what the remedy names
    ("strict", [DEVELOPER, ASK, ANSWER], "data-row", 0, "role system"),
    ("known roles alone", [DEVELOPER, ASK, ANSWER], "data-unrendered", 0, "role system"),
    ("the first system alone", [SYSTEM, ASK, ANSWER, SYSTEM, ASK, ANSWER], "data-unrendered", 3, "Join"),
    ("the first system alone", [SYSTEM, SYSTEM, ASK, ANSWER], "data-unrendered", 1, "Join"),
    ("alternating", [ASK, ASK, ANSWER], "data-row", 1, "messages[0], messages[1]"),
    ("alternating", [ASK, ANSWER, ANSWER], "data-row", 2, "messages[1], messages[2]"),
    ("alternating", [ANSWER, ASK, ANSWER], "data-row", 0, "before the first question"),
    ("thoughts by choice", [ASK, THINKING], "data-unrendered", 1, "enable_thinking: true"),
    ("thoughts never", [ASK, THINKING], "data-unrendered", 1, "Take the thoughts out"),
    ("named answers", [ASK, calling("a"), found("b"), ANSWER], "data-row", 2, "`name`"),
    ("one call", [ASK, calling("a", "b"), found("c"), found("d"), ANSWER], "data-row", 1, "one call"),
    ("the first call alone", [ASK, calling("a", "b"), found("c"), found("d"), ANSWER], "template-unprovable", 1, "one call"),
]  # fmt: skip


@pytest.mark.parametrize(("habit", "messages", "code", "place", "remedy"), REFUSED)
def test_a_refusal_names_the_message_at_fault_and_a_change_that_works(habit, messages, code, place, remedy, chat, made):
    with expect_error(code, "data[0]", f"messages[{place}]") as caught:
        made([{"messages": messages}], chat("chatml"), chat_template=HABITS[habit])
    assert remedy in caught.value.remedy


def test_tools_that_are_not_written_can_be_ignored_as_the_remedy_says(chat, made):
    row = {"messages": [ASK, ANSWER], "tools": [TOOL]}
    with expect_error("data-unrendered", "data[0]", "tools") as caught:
        made([row], chat("chatml"), chat_template=HABITS["no tools"])
    assert "columns: {tools: ignore}" in caught.value.remedy


def test_a_change_that_does_not_help_is_not_advised(chat, made):
    with expect_error("data-row", "data[0]", "messages[2]") as caught:
        made([{"messages": [ASK, calling("a"), found("b"), ANSWER]}], chat("chatml"), chat_template=HABITS["strict"])
    assert "name" not in caught.value.remedy and "Join" not in caught.value.remedy


def test_a_template_that_reads_parts_alone_gets_them_in_training_and_in_generation(chat, made, answers):
    template, tokenizer = HABITS["pictures"], chat("chatml")
    messages = [SYSTEM, ASK, ANSWER, ASK, {**ANSWER, "content": "B"}]
    example = made([{"messages": messages}], tokenizer, chat_template=template).train[0]
    assert answers(example, tokenizer) == ["A<|im_end|>", "B<|im_end|>"]
    asked = load_template(tokenizer, template).render(messages[:2], prompt=True)
    assert "S<|im_end|>" in asked and "Q<|im_end|>" in asked
    ids = Encoder.of(tokenizer).prompt(asked)
    assert example.input_ids[: len(ids)].tolist() == ids


def test_generation_tags_may_begin_in_the_prompt_that_opens_a_thought(chat, made, answers):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    example = made([{"messages": [SYSTEM, ASK, ANSWER]}], chat("chatml"), chat_template=template).train[0]
    assert answers(example, chat("chatml")) == ["\n</think>\n\nA<|im_end|>"]


SAYS_AND_CALLS = {**calling("Oslo"), "content": "Looking."}
BEHIND = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + CALLS + "{{ m.content }}<|im_end|>\n{% endfor %}" + ASKED
MOVED = (
    "{% for m in messages %}{% if m.role == 'tool' %}<answer>{{ m.content }}</answer>{{ messages[loop.index0 - 1].content }}"
    "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n"
    + CALLS
    + "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endif %}{% endfor %}" + ASKED
)


def test_a_text_behind_its_calls_is_trained_where_it_stays_there(chat, made, answers):
    row = {"messages": [ASK, SAYS_AND_CALLS, found("5"), ANSWER]}
    example = made([row], chat("chatml"), chat_template=BEHIND).train[0]
    assert answers(example, chat("chatml"))[0] == '<call>look{"at": "Oslo"}</call>Looking.<|im_end|>'
    with expect_error("template-unprovable", "data[0]", "messages[1]"):
        made([row], chat("chatml"), chat_template=MOVED)
