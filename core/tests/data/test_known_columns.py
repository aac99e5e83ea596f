"""Columns that change what a row means: each is read, or refused until the recipe names it; no other is passed over."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.formats.wanted import Wanted
from luthier.data.prepare import prepare_data
from luthier.recipe.schema import Data, Source

QUIET = settings(max_examples=30, deadline=None)
ASKED = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "sky"}
SCHEMA = {"type": "function", "function": {"name": "weather", "description": "QZX", "parameters": {"type": "object"}}}
ROWS = {
    "messages": {"messages": [ASKED, SAID]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "sky"}]},
    "alpaca": {"instruction": "hi", "output": "sky"},
    "prompt_completion": {"prompt": "hi", "completion": "sky"},
    "conversational": {"prompt": [ASKED], "completion": [SAID]},
    "chatml": {"text": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nsky<|im_end|>\n"},
    "preference": {"prompt": "hi", "chosen": "sky", "rejected": "sea"},
    "unpaired": {"prompt": "hi", "completion": "sky", "label": True},
    "preference_messages": {"chosen": [ASKED, SAID], "rejected": [ASKED, {**SAID, "content": "sea"}]},
    "text": {"text": "sky"},
    "tokens": {"input_ids": [5, 6, 7]},
}
TALKS = [name for name in ROWS if name not in ("text", "tokens")]
SPOKEN = ("messages", "sharegpt", "prompt_completion", "conversational")
EMPTY = (None, "", [], {})


def wanted_of(name):
    kind = name.partition("_")[0]
    return Wanted(kind=kind) if kind in ("preference", "unpaired") else Wanted()


def run(row, tokenizer, name="", source=None, **options):
    data = Data(train=[Source(path="rows", **(source or {}))], **options)
    return prepare_data(data, tokenizer, seed=0, wanted=wanted_of(name), given=[row] if isinstance(row, dict) else row)


def text_of(prepared, tokenizer):
    return tokenizer.decode(prepared.train[0].input_ids).removeprefix("<s>")


def refused(*arguments, **options):
    with pytest.raises(LuthierError) as caught:
        run(*arguments, **options)
    return caught.value


@pytest.mark.parametrize("name", TALKS)
def test_a_system_prompt_beside_any_form_stands_before_what_is_asked(name, chat):
    tokenizer = chat("qwen")
    text = text_of(run({**ROWS[name], "system": "Answer in rhyme."}, tokenizer, name), tokenizer)
    assert text.startswith("<|im_start|>system\nAnswer in rhyme.") and text.index("rhyme") < text.index("hi")
    for empty in EMPTY:
        bare = run({**ROWS[name], "system": empty}, tokenizer, name)
        assert bare.train.fingerprint == run(ROWS[name], tokenizer, name).train.fingerprint


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tools_beside_any_form_reach_the_template(name, column, chat):
    tokenizer = chat("qwen")
    for tools in ([SCHEMA], [SCHEMA["function"]], json.dumps([SCHEMA])):
        prepared = run({**ROWS[name], column: tools}, tokenizer, name)
        assert "QZX" in text_of(prepared, tokenizer)
        assert not any("nothing reads" in warning for warning in prepared.report.warnings)


@pytest.mark.parametrize("tools", [["wikipedia"], "wikipedia", [{"type": "web_search"}], 5, {"a": 1}])
def test_tools_that_are_no_schemas_are_a_column_like_any_other(tools, chat):
    prepared = run({**ROWS["alpaca"], "tools": tools}, chat("qwen"))
    assert prepared.train.fingerprint == run(ROWS["alpaca"], chat("qwen")).train.fingerprint
    assert "nothing reads these columns: tools" in prepared.report.warnings


def test_two_system_prompts_are_an_error_and_one_twice_is_not(chat):
    row = {"messages": [{"role": "system", "content": "A"}, ASKED, SAID]}
    error = refused({**row, "system": "B"}, chat("qwen"))
    assert (error.code, error.where) == ("data-row", "data[0]: system")
    both = run({**row, "system": "A"}, chat("qwen"))
    assert both.train.fingerprint == run(row, chat("qwen")).train.fingerprint


def test_turns_have_everything_that_messages_have(chat):
    call = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages = [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        SAID,
    ]
    turns = [{"from": m["role"], "value": m["content"], **{k: m[k] for k in m if k == "tool_calls"}} for m in messages]
    kept = run({"messages": messages}, chat("qwen"))
    assert "Oslo" in text_of(kept, chat("qwen"))
    for spelled in (messages, turns):
        assert run({"conversations": spelled}, chat("qwen")).train.fingerprint == kept.train.fingerprint


def test_earlier_turns_of_alpaca_are_the_conversation_that_they_are(chat):
    history = [["one?", "1"], ["two?", "2"]]
    turns = [
        (role, said)
        for pair in [*history, ["hi", "sky"]]
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    same = run({"messages": [{"role": role, "content": said} for role, said in turns]}, chat("qwen"))
    for written in (history, [tuple(turn) for turn in history], json.dumps(history)):
        assert run({**ROWS["alpaca"], "history": written}, chat("qwen")).train.fingerprint == same.train.fingerprint
    assert refused({**ROWS["alpaca"], "history": [["one?"]]}, chat("qwen")).where == "data[0]: history[0]"
    assert refused({**ROWS["alpaca"], "history": history}, chat(None)).code == "template-missing"


VARIABLE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if mood is defined %}({{ mood }}) {% endif %}{% endif %}"
)
MOODS = VARIABLE.replace(
    "{{ m.content }}", "{% if m.role == 'user' and mood is defined %}[{{ mood }}] {% endif %}{{ m.content }}"
)


@pytest.mark.parametrize("name", [name for name in TALKS if name != "prompt_completion"])
def test_variables_of_a_row_win_over_the_recipes(name, chat):
    def shown(row, **options):
        return text_of(run({**ROWS[name], **row}, chat("chatml"), name, chat_template=MOODS, **options), chat("chatml"))

    assert "[" not in shown({})
    assert "[calm] hi" in shown({}, chat_template_kwargs={"mood": "calm"})
    assert "[wild] hi" in shown({"chat_template_kwargs": {"mood": "wild"}}, chat_template_kwargs={"mood": "calm"})
    assert "[wild] hi" in shown({"chat_template_kwargs": '{"mood": "wild"}'})
    assert "[" not in shown({"chat_template_kwargs": {"mood": None}})


def test_variables_are_the_templates_own_alone_and_those_it_passes_over_are_told(chat):
    prepared = run({**ROWS["messages"], "chat_template_kwargs": {"moood": 1}}, chat("chatml"))
    assert any("does not read these of chat_template_kwargs: moood" in warning for warning in prepared.report.warnings)
    for taken in ("tools", "messages", "add_generation_prompt"):
        error = refused({**ROWS["messages"], "chat_template_kwargs": {taken: []}}, chat("chatml"))
        assert error.code == "data-row" and error.where == "data[0]: chat_template_kwargs"
    assert refused({**ROWS["messages"], "chat_template_kwargs": 5}, chat("chatml")).code == "data-row"
    recipe = refused(ROWS["messages"], chat("chatml"), chat_template_kwargs={"tools": []})
    assert (recipe.code, recipe.where) == ("recipe-conflict", "data.chat_template_kwargs")


MEANING = [(name, ["1.jpg"]) for name in ("images", "audio", "video")]
MEANING += [("weight", 0.5), ("loss_weight", 2), ("train", False), ("unmask", True)]


@pytest.mark.parametrize(("column", "value"), MEANING)
@pytest.mark.parametrize("name", ROWS)
def test_a_column_that_would_change_the_meaning_is_refused_until_it_is_named(name, column, value, chat):
    row, tokenizer = {**ROWS[name], column: value}, chat("qwen")
    error = refused(row, tokenizer, name)
    assert (error.code, error.where) == ("data-column", f"data[0]: {column}")
    assert f"columns: {{{column}: ignore}}" in error.remedy
    plain = run(ROWS[name], tokenizer, name)
    ignored = run(row, tokenizer, name, {"columns": {column: "ignore"}})
    assert ignored.train.fingerprint == plain.train.fingerprint and ignored.report.warnings == plain.report.warnings
    for empty in EMPTY:
        assert run({**row, column: empty}, tokenizer, name).train.fingerprint == plain.train.fingerprint


@pytest.mark.parametrize(("column", "value"), [("weight", 1), ("train", True), ("unmask", False), ("weight", "3 kg")])
def test_a_flag_of_the_row_that_says_what_is_so_anyway_is_none(column, value, chat):
    plain, told = (run(row, chat("qwen")) for row in (ROWS["messages"], {**ROWS["messages"], column: value}))
    assert plain.train.fingerprint == told.train.fingerprint
    named = [f"nothing reads these columns: {column}"] if isinstance(value, str) else []
    assert [warning for warning in told.report.warnings if "nothing reads" in warning] == named


@pytest.mark.parametrize("name", [name for name in ROWS if name.partition("_")[0] not in ("preference", "unpaired")])
@pytest.mark.parametrize("column", ["weight", "score"])
def test_a_weight_that_the_recipe_names_multiplies_the_rows_loss(name, column, chat):
    rows = [{**ROWS[name], column: value} for value in (0.25, "2", None)]
    prepared = run(rows, chat("qwen"), name, {"columns": {"weight": column}})
    assert prepared.train.weights.tolist() == [0.25, 2.0, 1.0]
    assert (
        refused({**ROWS[name], column: "much"}, chat("qwen"), name, {"columns": {"weight": column}}).code == "data-row"
    )
    none = refused({**ROWS[name], column: 0}, chat("qwen"), name, {"columns": {"weight": column}})
    assert none.code == "data-unsupervised"


def test_weights_of_rows_are_refused_where_nothing_carries_them(chat):
    mapped = {"columns": {"weight": "score"}}
    pair = refused({**ROWS["preference"], "score": 2}, chat("qwen"), "preference", mapped)
    assert pair.code == "recipe-conflict"
    block = refused({"text": "sky", "score": 2}, chat("qwen"), "text", mapped, block_size=8)
    assert block.code == "recipe-conflict"


@pytest.mark.parametrize("name", SPOKEN)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_an_answer_to_be_avoided_is_not_trained(name, column, chat):
    good, bad = ({**ROWS[name], column: verdict} for verdict in (True, False))
    assert len(run(good, chat("qwen")).train) == 1
    error = refused(bad, chat("qwen"))
    assert (error.code, error.where) == ("data-avoided", f"data[0]: {column}")
    assert refused({**ROWS[name], column: "False"}, chat("qwen")).code == "data-avoided"
    assert len(run(bad, chat("qwen"), source={"columns": {column: "ignore"}}).train) == 1


@pytest.mark.parametrize("name", ["alpaca", "text", "tokens"])
def test_a_label_elsewhere_or_of_another_kind_is_a_column_that_nothing_reads(name, chat):
    assert "nothing reads these columns: label" in run({**ROWS[name], "label": False}, chat("qwen")).report.warnings
    for label in (0, "cat"):
        told = run({**ROWS["messages"], "label": label}, chat("qwen")).report.warnings
        assert "nothing reads these columns: label" in told


def test_a_label_that_the_loss_reads_is_its_own(chat):
    row = {**ROWS["prompt_completion"], "label": False}
    wanted = Wanted(columns={"label": "bool"})
    prepared = prepare_data(Data(train=[Source(path="rows")]), chat("qwen"), seed=0, wanted=wanted, given=[row])
    assert prepared.train.columns["label"].tolist() == [False]


@pytest.mark.parametrize("column", ["images", "label", "system", "tools", "weight", "history", "chat_template_kwargs"])
def test_a_column_that_columns_or_a_template_uses_is_no_error_and_is_read_once(column, chat):
    row = {"q": "hi", "a": "sky", column: "used"}
    mapped = run(row, chat("qwen"), source={"columns": {"prompt": column, "completion": "a"}})
    assert text_of(mapped, chat("qwen")) == "usedsky</s>"
    written = {"template": {"prompt": f"{{{column}}} {{q}}:", "completion": "{a}"}}
    templated = run(row, chat("qwen"), source=written)
    assert text_of(templated, chat("qwen")) == "used hi:sky</s>"
    assert not templated.report.warnings


def test_masks_of_tokens_are_read_as_labels(chat):
    ids = {"input_ids": [5, 6, 7, 8]}
    for masks in (
        {"loss_mask": [0, 1, 0, 1]},
        {"completion_mask": [False, True, True, True], "assistant_masks": [1, 1, 0, 1]},
    ):
        assert run({**ids, **masks}, chat(None)).train[0].labels.tolist() == [-100, 6, -100, 8]
    both = {**ids, "labels": [-100, 6, -100, 8]}
    assert run({**both, "loss_mask": [0, 1, 0, 1]}, chat(None)).train[0].labels.tolist() == both["labels"]
    assert refused({**both, "loss_mask": [0, 1, 1, 1]}, chat(None)).where == "data[0]: loss_mask"
    assert refused({**ids, "loss_mask": [1, 1]}, chat(None)).where == "data[0]: loss_mask"


@QUIET
@given(names=st.lists(st.sampled_from(["id", "source", "topic", "lang"]), unique=True), filled=st.booleans())
def test_columns_that_nothing_reads_are_named_once_whatever_the_form(names, filled, chat):
    extra = dict.fromkeys(names, "x" if filled else "")
    for name, row in ROWS.items():
        told = run([{**row, **extra}] * 3, chat("qwen"), name).report.warnings
        said = [f"nothing reads these columns: {', '.join(sorted(names))}"] if names and filled else []
        assert [warning for warning in told if "nothing reads" in warning] == said


def test_keys_of_messages_that_nothing_reads_are_named_and_pictures_in_them_refused(chat):
    told = run({"messages": [{**ASKED, "id": 3, "when": None}, SAID]}, chat("qwen")).report.warnings
    assert "nothing reads these columns: messages[].id" in told
    error = refused({"messages": [{**ASKED, "images": ["1.jpg"]}, SAID]}, chat("qwen"))
    assert (error.code, error.where) == ("data-row", "data[0]: messages[0].images")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_misspelt_column_that_is_ignored_is_told_with_the_nearest(chat, streaming):
    rows = [{**ROWS["messages"], "origin": "a"}, {**ROWS["messages"], "source_id": 3}]
    ignores = {"columns": {"orgin": "ignore", "source_id": "ignore"}}
    told = run(rows, chat("qwen"), source=ignores, streaming=streaming).report.warnings
    [absent] = [warning for warning in told if "no row has" in warning]
    assert "'orgin' (Did you mean 'origin'" in absent
    assert "source_id" not in absent
    assert not any(
        "no row has" in w for w in run(rows, chat("qwen"), source={"columns": {"origin": "ignore"}}).report.warnings
    )


def test_answers_with_a_label_name_a_loss_that_takes_verdicts_whatever_loss_they_were_given(chat):
    rows = [{**ROWS["unpaired"], "label": good} for good in (True, False)]
    for name, code in (("preference", "data-format"), ("", "data-avoided")):
        with pytest.raises(LuthierError) as caught:
            run(rows, chat("chatml"), name)
        assert caught.value.code == code and "kto" in caught.value.remedy
