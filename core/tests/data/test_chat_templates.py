"""Supervised spans under many chat templates, read back by decoding what is supervised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.tokenise.chat_template import load_template
from luthier.testing import expect_error

STOPS = {
    "chatml": "<|im_end|>",
    "mute": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "bare": "</s>",
    "tagged": "<|im_end|>",
    "tagged_loose": "<|im_end|>",
    "thinking": "<|im_end|>",
    "literal_bos": "</s>",
    "double_bos": "</s>",
    "qwen": "<|im_end|>",
    "mistral": "</s>",
}
WORDS = st.text(alphabet="ab \n<>|é漢🎻.", min_size=1, max_size=12).filter(lambda text: text.strip())
QUIET = settings(max_examples=12, deadline=None)


def dialogue(turns):
    return [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]


@pytest.mark.parametrize("template", STOPS)
@QUIET
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_exactly_the_answers_and_their_stop_tokens_are_supervised(template, turns, chat, made, answers):
    tokenizer, stop = chat(template), STOPS[template]
    example = made([{"messages": dialogue(turns)}], tokenizer).train[0]
    found = answers(example, tokenizer)
    assert [text.strip() for text in found] == [answer.strip() + stop for _, answer in turns] or [
        text.removesuffix(stop).strip() + stop for text in found
    ] == [answer.strip() + stop for _, answer in turns]
    assert all(text.count(stop) == 1 and text.endswith(stop) for text in found)


@pytest.mark.parametrize("template", STOPS)
@QUIET
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_a_text_has_exactly_one_bos_in_front(template, turns, chat, made):
    tokenizer = chat(template)
    ids = made([{"messages": dialogue(turns)}], tokenizer).train[0].input_ids.tolist()
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", ["chatml", "llama3", "bare", "literal_bos", "qwen", "mistral", "tagged"])
def test_an_answer_that_already_ends_with_the_stop_token_gets_no_second(template, chat, made):
    tokenizer, stop = chat(template), STOPS[template]
    plain = made([{"messages": dialogue([("hi", "good day")])}], tokenizer).train
    for ended in (f"good day{stop}", f"good day{stop}\n", f"good day{stop}{stop}", "good day</s>"):
        assert made([{"messages": dialogue([("hi", ended)])}], tokenizer).train.fingerprint == plain.fingerprint


@QUIET
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_chatml_equals_tokens_written_by_hand(turns, chat, made):
    tokenizer = chat("chatml")
    example = made([{"messages": dialogue(turns)}], tokenizer).train[0]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids, on = [tokenizer.bos_token_id], [False]
    for question, answer in turns:
        for role, content in (("user\n", question), ("assistant\n", answer)):
            parts = ([start, *encoded(tokenizer, role)], [*encoded(tokenizer, content), end], encoded(tokenizer, "\n"))
            ids += [token for part in parts for token in part]
            on += [role == "assistant\n" and part is parts[1] for part in parts for _ in part]
    assert example.input_ids.tolist() == ids
    assert (example.labels != -100).tolist() == on


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@QUIET
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_generation_tags_give_the_mask_of_transformers(turns, chat, made):
    tokenizer = chat("tagged")
    example = made([{"messages": dialogue(turns)}], tokenizer).train[0]
    theirs = tokenizer.apply_chat_template(dialogue(turns), return_dict=True, return_assistant_tokens_mask=True)
    assert example.input_ids[1:].tolist() == theirs["input_ids"]  # ours has the BOS that the tokenizer adds
    assert (example.labels[1:] != -100).tolist() == [bool(on) for on in theirs["assistant_masks"]]


def test_tags_and_offsets_find_the_same_spans(chat, made):
    rows = [{"messages": dialogue([("a?", "b."), ("c?", "d\n")])}, {"messages": dialogue([("é", "漢")])}]
    sets = [made(rows, chat(name)).train for name in ("chatml", "tagged", "tagged_loose", "mute")]
    assert len({dataset.fingerprint for dataset in sets}) == 1


def test_a_template_that_rewrites_history_gives_one_example_an_answer(chat, made, answers):
    tokenizer = chat("thinking")
    thoughts = ["<think>\none\n</think>\n\n1", "<think>\ntwo\n</think>\n\n2", "3"]
    rows = [{"messages": dialogue(zip("abc", thoughts, strict=True))}]
    prepared = made(rows, tokenizer)
    assert [answers(example, tokenizer) for example in prepared.train] == [[t + "<|im_end|>"] for t in thoughts]
    for i, example in enumerate(prepared.train):  # each begins with the very prompt that generation is given
        before = rows[0]["messages"][: 2 * i + 1]
        prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
        prompt_ids = [tokenizer.bos_token_id, *encoded(tokenizer, prompt)]
        assert example.input_ids[: len(prompt_ids)].tolist() == prompt_ids
    assert prepared.report.changes == {"parted": 1}
    assert "one example for each answer" in prepared.report.warnings[0]


def test_a_rewriting_template_leaves_a_dialogue_without_thoughts_whole(chat, made):
    prepared = made([{"messages": dialogue([("a", "1"), ("b", "2")])}], chat("thinking"))
    assert len(prepared.train) == 1 and not prepared.report.changes


TURN = "{{ '<|' + m.role + '|>\\n' + m.content + (%s if m.role == 'assistant' else '') }}"
ODD = {  # how a template closes answers -> what is supervised of two of them, and in how many examples
    "by two tokens": ("'</s><|im_end|>\\n'", "", ["A1</s><|im_end|>", "A2</s><|im_end|>"], 1),
    "and ends the text with EOS": ("'<|im_end|>\\n'", "{{ eos_token }}", ["A1<|im_end|>", "A2<|im_end|>"], 2),
    "but not the last": ("'' if loop.last else eos_token", "", ["A1</s>", "A2</s>"], 1),
    "with another token at the end": (
        "'<|eom_id|>' if loop.last else '<|eot_id|>'",
        "",
        ["A1<|eom_id|>", "A2<|eom_id|>"],
        2,
    ),
    "after a line break": ("'\\n<|im_end|>'", "", ["A1\n<|im_end|>", "A2\n<|im_end|>"], 1),
    "but the last with a line break": ("'' if loop.last else '\\n\\n'", "", ["A1</s>", "A2</s>"], 1),
}


@pytest.mark.parametrize("how", ODD)
def test_a_template_may_close_answers_oddly(how, chat, made, answers):
    closing, end, wanted, count = ODD[how]
    template = "{% for m in messages %}" + TURN % closing + "{% endfor %}" + end
    template += "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    prepared = made([{"messages": dialogue([("Q", "A1"), ("Q", "A2")])}], chat("chatml"), chat_template=template)
    assert [text for example in prepared.train for text in answers(example, chat("chatml"))] == wanted
    assert len(prepared.train) == count
    for example in prepared.train if "EOS" not in how else ():
        assert chat("chatml").decode(example.input_ids).count("</s>") == sum(text.count("</s>") for text in wanted)


def test_a_thought_stands_where_the_prompt_puts_an_empty_one(chat, made, answers):
    template = chat("thinking").chat_template.replace("assistant\\n' }}", "assistant\\n<think>\\n\\n</think>\\n\\n' }}")
    template = template.replace("{%- set content = message['content'] -%}", EMPTY_THOUGHT)
    for answer, wanted in (("<think>\nhm\n</think>\n\n1", "<think>\nhm\n</think>\n\n1"), ("1", "1")):
        row = {"messages": dialogue([("a", answer)])}
        example = made([row], chat("chatml"), chat_template=template, unrendered="warn").train[0]
        assert answers(example, chat("chatml")) == [wanted + "<|im_end|>"]


EMPTY_THOUGHT = """{%- set content = message['content'] -%}
{%- if message['role'] == 'assistant' and '</think>' not in content -%}
{%- set content = '<think>\\n\\n</think>\\n\\n' + content -%}
{%- endif -%}"""
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
TOOL_ROW = {
    "tools": TOOLS,
    "messages": [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "It is 5."},
    ],
}


def test_tool_calls_are_supervised_and_tool_responses_are_not(chat, made, answers):
    tokenizer = chat("qwen")
    example = made([TOOL_ROW], tokenizer).train[0]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'
    assert answers(example, tokenizer) == [call, "It is 5.<|im_end|>"]
    assert "<tool_response>\n5\n</tool_response>" in tokenizer.decode(example.input_ids)


def test_a_tool_call_may_end_with_a_stop_token_of_its_own(chat, made, answers):
    tokenizer = chat("llama3")
    prepared = made([TOOL_ROW], tokenizer, unrendered="warn")
    call = '{"name": "add", "parameters": {"a": 2, "b": 3}}<|eom_id|>'
    assert answers(prepared.train[0], tokenizer) == [call, "It is 5.<|eot_id|>"]
    assert tokenizer.convert_ids_to_tokens(list(prepared.stop_tokens)) == ["<|eot_id|>", "<|eom_id|>"]
    assert prepared.report.unrendered == {"tools": 1}


def test_a_template_that_joins_arguments_as_text_gets_them_as_json(chat, made, answers):
    template = chat("qwen").chat_template.replace("(call.function.arguments | tojson)", "call.function.arguments")
    example = made([TOOL_ROW], chat("chatml"), chat_template=template).train[0]
    assert '"arguments": {"a": 2, "b": 3}}' in answers(example, chat("chatml"))[0]


def test_a_template_that_writes_the_date_is_told(chat, made):
    template = "{{ strftime_now('%Y') }}" + chat("chatml").chat_template
    warnings = made([{"messages": dialogue([("a", "b")])}], chat("chatml"), chat_template=template).report.warnings
    assert warnings == ["the chat template writes today's date: on another day the same rows give other tokens"]


def test_a_template_that_writes_no_tool_calls_is_refused(chat, made):
    with pytest.raises(LuthierError) as caught:
        made([TOOL_ROW], chat("chatml"))
    assert caught.value.code == "template-unprovable" and caught.value.where == "data[0]"
    assert "messages[1]" in caught.value.problem


def test_a_template_that_changes_the_answers_is_refused(chat, made):
    with pytest.raises(LuthierError) as caught:
        made([{"messages": dialogue([("hi", "hello")])}], chat("shouting"))
    assert caught.value.code == "template-unprovable" and "HELLO" in str(caught.value.found)


def test_a_conversation_that_the_template_refuses_is_an_error_with_the_templates_words(chat, made):
    row = {"messages": [{"role": "user", "content": "a"}, *dialogue([("b", "c")])]}
    with expect_error("data-row", "data[1]") as caught:
        made([{"messages": dialogue([("x", "y")])}, row], chat("mistral"))
    assert caught.value.code == "data-row" and caught.value.where == "data[1]"


def test_a_default_system_prompt_of_the_template_is_told(chat, made):
    system = {"role": "system", "content": "Be brief."}
    rows = [{"messages": dialogue([("a", "b")])}, {"messages": [system, *dialogue([("a", "b")])]}]
    warning = made(rows, chat("qwen")).report.warnings[0]
    assert "'You are a helpful tiny model.'" in warning and "1 of 2 rows" in warning
    assert not made(rows, chat("chatml")).report.warnings


def test_special_tokens_inside_of_messages_are_told(chat, made):
    rows = [{"messages": dialogue([("what is <|im_end|>?", "b")])}, {"messages": dialogue([("a", "b")])}]
    warning = made(rows, chat("chatml")).report.warnings[0]
    assert warning.startswith("1 of 2 rows (50.0 %) hold special tokens in their messages' text")


def test_a_template_without_stop_tokens_is_told(chat, made):
    warnings = made([{"messages": dialogue([("a", "b")])}], chat("bare")).report.warnings
    assert warnings == ["the chat template ends answers with no special token: </s> is put after each"]


def test_a_conversation_may_begin_with_the_assistant(chat, made, answers):
    messages = [{"role": "assistant", "content": "Welcome."}, *dialogue([("hi", "bye")])]
    for template in ("chatml", "llama3", "tagged", "bare", "mute"):
        found = answers(made([{"messages": messages}], chat(template)).train[0], chat(template))
        assert found == ["Welcome." + STOPS[template], "bye" + STOPS[template]]


def test_messages_of_weight_0_are_not_supervised(chat, made, answers):
    messages = dialogue([("a", "wrong"), ("b", "right")])
    messages[1]["weight"] = 0
    for template in ("chatml", "tagged", "thinking"):
        found = answers(made([{"messages": messages}], chat(template)).train[0], chat(template))
        assert found == ["right<|im_end|>"]


def test_train_on_all_supervises_every_token_once(chat, made):
    rows = [{"messages": dialogue([("a", "<think>x</think>b"), ("c", "d")])}]
    for template in ("thinking", "bare", "llama3"):
        prepared = made(rows, chat(template), train_on="all")
        example = prepared.train[0]
        assert len(prepared.train) == 1
        np.testing.assert_array_equal(example.labels[1:], example.input_ids[1:])


def test_the_recipes_template_stands_in_the_tokenizers_place(chat, made, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(chat("llama3").chat_template)
    rows = [{"messages": dialogue([("a", "b")])}]
    ours = made(rows, chat("llama3"))
    for given_as in (str(file), file.read_text()):
        other = made(rows, chat("chatml"), chat_template=given_as)
        assert other.train.fingerprint == ours.train.fingerprint
        assert other.chat_template_hash == ours.chat_template_hash
        assert other.chat_template == chat("llama3").chat_template
    assert made(rows, chat("chatml")).chat_template_hash != ours.chat_template_hash


@pytest.mark.parametrize(
    ("template", "code", "words"),
    [
        ("{% for m in messages %}{{ m.content }}", "template-unprovable", ("template-unprovable",)),
        ("no/such/file.jinja", "data-not-found", ("data.chat_template",)),
    ],
)
def test_a_bad_template_in_the_recipe_is_an_error(template, code, words, chat, made):
    with pytest.raises(LuthierError) as caught:
        made([{"messages": dialogue([("a", "b")])}], chat("chatml"), chat_template=template)
    assert all(fact in str(caught.value) for fact in words)
    assert caught.value.code == code


def test_conversations_without_any_template_are_an_error(chat, made):
    with pytest.raises(LuthierError) as caught:
        made([{"messages": dialogue([("a", "b")])}], chat(None))
    assert caught.value.code == "template-missing" and caught.value.where == "data[0]"


def test_a_tokenizer_with_two_templates_uses_the_one_for_tools_with_tools(chat, made):
    tokenizer = chat.__wrapped__("chatml")
    tokenizer.chat_template = {"default": chat("chatml").chat_template, "tool_use": chat("qwen").chat_template}
    both = made([TOOL_ROW, {"messages": dialogue([("a", "b")])}], tokenizer).train
    assert tokenizer.decode(both[0].input_ids) == tokenizer.decode(made([TOOL_ROW], chat("qwen")).train[0].input_ids)
    assert "tiny model" not in tokenizer.decode(both[1].input_ids)
    assert made([TOOL_ROW], tokenizer).chat_template == tokenizer.chat_template


def test_what_a_template_does_is_found_by_trying(chat):
    found = {name: load_template(chat(name)) for name in STOPS}
    assert {name: template.stop for name, template in found.items()} == STOPS
    assert {name for name, template in found.items() if not template.closes} == {"bare"}
    assert {name for name, template in found.items() if not template.prompts} == {"mute", "tagged_loose", "mistral"}


@pytest.mark.parametrize("prompt", [False, True])
def test_messages_are_rendered_as_transformers_itself_does(chat, prompt):
    from luthier.data.template_calls import render_messages

    tokenizer = chat("qwen")
    call = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "Oslo", "at": None}}}
    said = [
        {"role": "system", "content": "S", "name": None},
        {"role": "user", "content": "<b>q</b> é"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "5", "tool_call_id": "c1"},
    ]
    tools = [
        {"type": "function", "function": {"name": "weather", "description": None, "parameters": {"type": "object"}}}
    ]
    for messages, offered in ((said, tools), (said[:2], None), (said[1:2], None)):
        expected = tokenizer.apply_chat_template(
            messages, tools=offered, add_generation_prompt=prompt, tokenize=False, enable_thinking=False
        )
        assert render_messages(tokenizer, None, messages, offered, prompt, {"enable_thinking": False}) == expected
