"""Supervision of a list of roles: their messages' own text and stop tokens, and nothing else, under any template."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import Recipe
from luthier.data.formats.conversations import make_conversation
from luthier.data.formats.message_roles import supervise_roles
from luthier.data.tokenise.chat_template import load_template
from luthier.data.tokenise.supervised_spans import render_conversation
from luthier.recipe.schema import Data, Source
from luthier.runs.metrics_file import read_metrics
from luthier.testing import expect_error

CLOSED = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "qwen": "<|im_end|>", "tagged": "<|im_end|>",
          "thinking": "<|im_end|>", "mute": "<|im_end|>"}  # fmt: skip
OPEN = ("mistral", "bare")  # templates without the answers' stop token behind a question
WORDS = st.text(alphabet="ab \n|é漢🎻.", min_size=1, max_size=12).filter(lambda text: text.strip())
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)
QUIET = settings(max_examples=12, deadline=None)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]


def dialogue(turns):
    return [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]


@pytest.mark.parametrize("template", CLOSED)
@QUIET
@given(turns=TURNS)
def test_exactly_the_messages_of_the_roles_and_their_stop_tokens_are_supervised(template, turns, chat, made, answers):
    tokenizer, stop = chat(template), CLOSED[template]
    for roles in (["user"], ["user", "assistant"]):
        example = made([{"messages": dialogue(turns)}], tokenizer, train_on=roles).train[0]
        expected = [m["content"].strip() + stop for m in dialogue(turns) if m["role"] in roles]
        found = [text.removesuffix(stop).strip() + stop for text in answers(example, tokenizer)]
        assert found == expected


@pytest.mark.parametrize("template", OPEN)
def test_a_question_that_the_template_does_not_close_is_supervised_without_a_stop_token(template, chat, made, answers):
    tokenizer = chat(template)
    rows = [{"messages": dialogue([("who?", "me"), ("why?", "so")])}]
    example = made(rows, tokenizer, train_on=["user"]).train[0]
    assert [text.strip() for text in answers(example, tokenizer)] == ["who?", "why?"]


@QUIET
@given(turns=TURNS)
def test_the_tokens_are_those_written_by_hand(turns, chat, made):
    tokenizer = chat("chatml")
    example = made([{"messages": dialogue(turns)}], tokenizer, train_on=["user"]).train[0]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids, on = [tokenizer.bos_token_id], [False]
    for message in dialogue(turns):
        head, said, tail = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"{message['role']}\n", message["content"], "\n")
        )
        ids += [start, *head, *said, end, *tail]
        on += [False] * (1 + len(head)) + [message["role"] == "user"] * (len(said) + 1) + [False] * len(tail)
    assert example.input_ids.tolist() == ids
    assert (example.labels != -100).tolist() == on


@pytest.mark.parametrize("template", [*CLOSED, *OPEN, "literal_bos", "double_bos"])
@pytest.mark.parametrize("streaming", [False, True])
def test_the_assistant_alone_is_the_default(template, streaming, chat, made):
    rows = [{"messages": dialogue([("a?", "b."), ("c?", "d")])}, {"prompt": "a", "completion": "b", "messages": None}]
    rows = [rows[0]] * 2
    named, default = (
        made(rows, chat(template), streaming=streaming, **options).train.fingerprint
        for options in ({"train_on": ["assistant"]}, {})
    )
    assert named == default
    assert Data(train=[Source(path="rows")], train_on=["assistant"]).train_on == "assistant"


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["tool"], ["3<|im_end|>"]),
        (["system", "tool"], ["be kind<|im_end|>", "3<|im_end|>"]),
        (["user", "tool"], ["1+2?<|im_end|>", "3<|im_end|>", "thanks<|im_end|>"]),
    ],
)
def test_tools_and_system_prompts_can_be_supervised(roles, expected, chat, made, answers):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "thanks"},
    ]
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    prepared = made([{"messages": messages}], chat("chatml"), train_on=roles, chat_template=template)
    assert answers(prepared.train[0], chat("chatml")) == expected
    both = made([{"messages": messages}], chat("chatml"), train_on=[*roles, "assistant"], chat_template=template)
    assert len(answers(both.train[0], chat("chatml"))) == len(expected) + 2


def test_flags_of_messages_win_over_the_roles(chat, made, answers):
    tokenizer = chat("chatml")
    messages = dialogue([("a", "1"), ("b", "2")])
    messages[0] |= {"train": False}
    messages[2] |= {"weight": 0.5}
    prepared = made([{"messages": messages}], tokenizer, train_on=["user", "assistant"])
    found = sorted((text, e.weight) for e in prepared.train for text in answers(e, tokenizer))
    assert found == [("1<|im_end|>", 1.0), ("2<|im_end|>", 1.0), ("b<|im_end|>", 0.5)]
    with expect_error("data-row", "data[0]: message 2", "user"):
        made([{"messages": [{**m, "train": True} for m in dialogue([("a", "1")])]}], tokenizer, train_on=["user"])


def test_a_template_that_rewrites_history_has_the_other_messages_in_an_example_of_their_own(chat, made, answers):
    tokenizer = chat("thinking")
    thoughts = ["<think>\none\n</think>\n\n1", "<think>\ntwo\n</think>\n\n2"]
    prepared = made(
        [{"messages": dialogue(zip("ab", thoughts, strict=True))}], tokenizer, train_on=["user", "assistant"]
    )
    assert [answers(example, tokenizer) for example in prepared.train] == [
        *([f"{thought}<|im_end|>"] for thought in thoughts), ["a<|im_end|>", "b<|im_end|>"],
    ]  # fmt: skip
    assert prepared.report.changes == {"parted": 1}


@pytest.mark.parametrize("name", [*CLOSED, *OPEN, "shouting"])
@QUIET
@given(turns=TURNS, later=TURNS)
def test_a_row_that_is_filled_in_is_what_it_is_by_itself(name, turns, later, chat):
    templates = [load_template(chat(name)) for _ in range(2)]

    def texts_of(given_turns, template):
        form = supervise_roles(make_conversation(dialogue(given_turns)), ["user", "assistant"], has_template=True)
        try:
            return render_conversation(form, template)
        except Exception as error:
            return str(error)

    texts_of(turns, templates[0])  # it may be learnt from
    assert texts_of(later[: len(turns)], templates[0]) == texts_of(later[: len(turns)], templates[1])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content | upper + eos_token }}{% endfor %}", "messages[0]"),
        ("{% for m in messages %}{{ m.content + ' ' + (m.content if m.role == 'user' else '') + eos_token }}{% endfor %}",
         "messages[0]"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_show_a_message_as_it_is_is_refused(template, problem, chat, made):
    rows = [{"messages": dialogue([("who?", "ME")])}]
    with expect_error("template-unprovable", "data[0]", problem):
        made(rows, chat("chatml"), train_on=["user"], chat_template=template)


@pytest.mark.parametrize(
    ("row", "options", "code"),
    [
        ({"text": "abc"}, {}, "recipe-conflict"),
        ({"input_ids": [5, 6, 7]}, {}, "recipe-conflict"),
        ({"prompt": "a", "completion": "b"}, {}, "data-row"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, {}, "data-unsupervised"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_a_message_of_these_roles_are_refused(row, options, code, streaming, chat, made):
    with (
        expect_error(code, None if code == "recipe-conflict" else "data[0]")
        if code != "recipe-conflict"
        else (expect_error(code, "data.train_on"))
    ):
        made([row], chat("chatml"), train_on=["user"], streaming=streaming, **options)


def test_alpaca_rows_and_prompts_of_messages_have_roles(chat, made, answers):
    tokenizer = chat("chatml")
    rows = [{"instruction": "do", "input": "", "output": "done"}]
    assert answers(made(rows, tokenizer, train_on=["user"]).train[0], tokenizer) == ["do<|im_end|>"]
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [{"prompt": asked, "completion": [{"role": "assistant", "content": "d"}]}]
    prepared = made(rows, tokenizer, train_on=["user", "assistant"])
    assert answers(prepared.train[0], tokenizer) == ["a<|im_end|>", "c<|im_end|>", "d<|im_end|>"]


def test_roles_are_read_from_a_recipe_in_any_order_and_none_is_an_error():
    given_rows = {"path": "rows.jsonl"}
    recipe = Recipe.from_dict({"model": "demo", "data": {"train": [given_rows], "train_on": ["tool", "user", "tool"]}})
    assert recipe.data.train_on == ["user", "tool"]
    for wrong, code in (([], "recipe-missing"), (["users"], "recipe-wrong-type"), ("user, tool", "recipe-wrong-type")):
        with pytest.raises(Exception, match="train_on") as caught:
            Recipe.from_dict({"model": "demo", "data": {"train": [given_rows], "train_on": wrong}})
        assert caught.value.code == code
    with expect_error("recipe-wrong-type", "data.train_on", "[user]"):
        Recipe.from_dict({"model": "demo", "data": {"train": [given_rows], "train_on": "user"}})


def test_a_run_is_trained_on_the_messages_of_the_roles(train, tmp_path, rows):
    runs = [
        train(data=rows, max_steps=1, output_dir=tmp_path / str(number), **{"data.train_on": roles})
        for number, roles in enumerate(("assistant", ["user"], ["user", "assistant"]))
    ]
    tokens = [read_metrics(run.output_path / "metrics.jsonl")[0]["supervised_tokens"] for run in runs]
    assert tokens[0] + tokens[1] == tokens[2]
    assert len({run.loss_history[0] for run in runs}) == 3


class Same:
    """A metric over answers: whether they are the references."""

    over = "answers"
    wants = ()

    def score_answers(self, answers, reference):
        return [float(answers[0] == reference), 1.0]

    def conclude(self, totals):
        return totals[0] / totals[1]


def test_a_metric_over_answers_is_refused_beside_roles(train, rows):
    with expect_error("recipe-conflict", "metrics", "Same"):
        train(data=rows, eval_data=rows[:2], metrics=[Same()], max_steps=1, **{"data.train_on": ["user"]})
