"""Preference pairs as texts, messages and transcripts, with and without their prompt."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.formats.forms import Pair
from luthier.data.formats.recognise_form import convert_row
from luthier.data.formats.wanted import Wanted
from luthier.data.prepare import prepare_data
from luthier.data.read.row import Row
from luthier.recipe.schema import Data, Source

PAIRED = Wanted(kind="preference")
WORDS = st.text("ab c", min_size=1, max_size=20)


def pair(**values):
    made = convert_row(Row(values, "a.jsonl:7"), "preference", PAIRED)
    assert isinstance(made, Pair) and made.where == "a.jsonl:7"
    return made.prompt, made.chosen, made.rejected


def said(*contents):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, contents, strict=False)]


def answered(text):
    return [{"role": "assistant", "content": text}]


def test_texts_with_a_prompt_stay_texts():
    assert pair(prompt="p", chosen="c", rejected="r") == ("p", "c", "r")


@settings(max_examples=50, deadline=None)
@given(chosen=WORDS, rejected=WORDS)
def test_texts_without_a_prompt_are_parted_at_what_they_share_and_nothing_is_lost(chosen, rejected):
    prompt, better, worse = pair(chosen=chosen, rejected=rejected)
    assert (prompt + better, prompt + worse) == (chosen, rejected) and better and worse


def test_what_two_texts_share_ends_at_a_word():
    assert pair(chosen="The cat sat", rejected="The cab came") == ("The", " cat sat", " cab came")


@pytest.mark.parametrize(
    "values",
    [
        {"chosen": said("q", "c"), "rejected": said("q", "r")},
        {"chosen": {"messages": said("q", "c")}, "rejected": {"messages": said("q", "r")}},
        {"prompt": said("q"), "chosen": said("q", "c"), "rejected": said("q", "r")},
        {"prompt": "q", "chosen": said("q", "c"), "rejected": said("q", "r")},
        {"prompt": said("q"), "chosen": answered("c"), "rejected": answered("r")},
        {"prompt": said("q"), "chosen": "c", "rejected": "r"},
        {"prompt": "q", "chosen": answered("c")[0], "rejected": answered("r")[0]},
        {"chosen": "\n\nHuman: q\n\nAssistant: c", "rejected": "\n\nHuman: q\n\nAssistant: r"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "c", "rejected": "r"},
    ],
)
def test_every_way_to_write_a_conversation_gives_the_same_pair(values):
    assert pair(**values) == (said("q"), answered("c"), answered("r"))


def test_a_prompt_of_several_turns_is_shared_and_later_turns_belong_to_the_answers():
    chosen, rejected = said("q", "a", "q2", "c"), said("q", "a", "q2", "r")
    assert pair(chosen=chosen, rejected=rejected) == (said("q", "a", "q2"), answered("c"), answered("r"))
    chosen, rejected = said("q", "c", "q2", "c2"), said("q", "r", "q2", "r2")
    assert pair(chosen=chosen, rejected=rejected) == (chosen[:1], chosen[1:], rejected[1:])


@pytest.mark.parametrize("prompt", [said("q"), None])
def test_answers_to_two_prompts_are_refused(prompt):
    with pytest.raises(LuthierError) as caught:
        pair(prompt=prompt, chosen=said("q", "c"), rejected=said("other", "r"))
    assert caught.value.code == "data-row"


def test_pairs_are_prepared_and_equal_ones_dropped_and_counted(chat, made):
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": "c", "rejected": "c"}]
    prepared = made(rows, chat("chatml"), wanted=PAIRED)
    assert [pair.names for pair in prepared.train] == [("chosen", "rejected")]
    assert prepared.report.drops == {"equal_pair": 1} and prepared.report.format == "preference"
    assert prepared.report.warnings == ["1 of 2 rows (50.0 %) were dropped: equal_pair 1"]


def test_pairs_for_a_loss_of_tokens_and_rows_for_a_loss_of_pairs_are_refused(chat, made):
    for rows, kind in (([{"chosen": "c", "rejected": "r"}], "tokens"), ([{"text": "c"}], "preference")):
        with pytest.raises(LuthierError) as caught:
            made(rows, chat("chatml"), wanted=Wanted(kind=kind))
        assert caught.value.code == "data-format" and caught.value.where == "data"


def texts(example, tokenizer):
    return {name: tokenizer.decode(one.input_ids) for name, one in example.by_name().items()}


def test_both_sides_are_the_template_of_the_prompt_with_their_answer(chat, made, answers):
    tokenizer = chat("chatml")
    (example,) = made([{"prompt": "q", "chosen": "yes", "rejected": "no"}], tokenizer, wanted=PAIRED).train
    for name, answer in (("chosen", "yes"), ("rejected", "no")):
        side = example.by_name()[name]
        assert answers(side, tokenizer) == [f"{answer}<|im_end|>"]
        talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        assert tokenizer.decode(side.input_ids).removeprefix("<s>") == tokenizer.apply_chat_template(
            talk, tokenize=False
        )


def test_without_a_template_or_a_prompt_of_its_own_texts_are_joined_as_they_are(chat, made):
    for tokenizer, row in (
        (chat(None), {"prompt": "q: ", "chosen": "yes", "rejected": "no"}),
        (chat("chatml"), {"chosen": "q: yes", "rejected": "q: no"}),
    ):
        (example,) = made([row], tokenizer, wanted=PAIRED).train
        assert texts(example, tokenizer) == {"chosen": "<s>q: yes</s>", "rejected": "<s>q: no</s>"}


@pytest.mark.parametrize("template", ["chatml", "qwen", "llama3", "mistral", "tagged", "mute", "bare", None])
@pytest.mark.parametrize("kind", ["preference", "unpaired"])
def test_an_empty_answer_is_an_answer_whose_stop_token_is_supervised(chat, made, answers, template, kind):
    tokenizer = chat(template)
    row = {"prompt": "q", "chosen": "yes", "rejected": "", "completion": "", "label": False}
    (example,) = made([row], tokenizer, wanted=Wanted(kind=kind)).train
    side = example.by_name()["rejected" if kind == "preference" else "text"]
    (found,) = answers(side, tokenizer)
    assert found.strip() in tokenizer.all_special_tokens  # a space after [/INST] is the answer's


def test_tools_of_the_row_are_written_before_both_answers(chat, made):
    function = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
    row = {
        "chosen": said("q", "yes"),
        "rejected": said("q", "no"),
        "tools": [{"type": "function", "function": function}],
    }
    (example,) = made([row], chat("qwen"), wanted=PAIRED).train
    assert all("weather" in text for text in texts(example, chat("qwen")).values())


def test_a_pair_above_max_length_is_dropped_cut_or_refused_as_the_recipe_says(chat, made):
    rows = [{"prompt": "q", "chosen": "c" * 30, "rejected": "r"}, {"prompt": "q", "chosen": "c", "rejected": "r"}]
    tokenizer = chat(None)
    kept = made(rows, tokenizer, wanted=PAIRED, max_length=12)
    assert kept.report.drops == {"overlong_pair": 1} and [e.index for e in kept.train] == [1]
    cut = made(rows, tokenizer, wanted=PAIRED, max_length=12, overlong="truncate")
    assert texts(cut.train[0], tokenizer) == {"chosen": "<s>q" + "c" * 10, "rejected": "<s>qr</s>"}
    assert cut.report.changes == {"truncated": 1}
    for overlong, code in (("error", "data-overlong"), ("split", "recipe-conflict")):
        with pytest.raises(LuthierError) as caught:
            made(rows, tokenizer, wanted=PAIRED, max_length=12, overlong=overlong)
        assert caught.value.code == code


def test_a_pair_that_truncation_makes_equal_or_leaves_without_answer_is_dropped(chat, made):
    rows = [
        {"prompt": "q", "chosen": "cccca", "rejected": "ccccb"},
        {"prompt": "q" * 20, "chosen": "c", "rejected": "r"},
        {"prompt": "q", "chosen": "c", "rejected": "r"},
    ]
    report = made(rows, chat(None), wanted=PAIRED, max_length=5, overlong="truncate").report
    assert report.drops == {"equal_pair": 1, "truncated_unsupervised": 1}


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": said("q"), "completion": answered("a")},
        {"messages": said("q", "a")},
        {"completion": said("q", "a")},
    ],
)
def test_every_way_to_write_a_judged_answer_gives_the_same_tokens(chat, made, answers, values):
    wanted = Wanted(kind="unpaired")
    (example,) = made([{**values, "label": True}], chat("chatml"), wanted=wanted).train
    (expected,) = made([{"prompt": "q", "completion": "a", "label": True}], chat("chatml"), wanted=wanted).train
    assert example.input_ids.tolist() == expected.input_ids.tolist() and example.columns == {"label": True}
    assert answers(example, chat("chatml")) == ["a<|im_end|>"]


def test_a_label_beside_a_completion_is_no_verdict_to_other_losses(chat, made):
    rows = [{"prompt": "q", "completion": "a", "label": "sport"}]
    assert made(rows, chat("chatml")).report.format == "prompt_completion"


@pytest.mark.parametrize("value", ["true", "False"])
def test_csv_files_write_a_verdict_and_numbers_as_text(tmp_path, chat, value):
    (tmp_path / "a.csv").write_text(f"prompt,completion,label,margin,rank\nq,a,{value},0.5,7\n")
    wanted = Wanted(kind="unpaired", columns={"margin": "float", "rank": "int"})
    (example,) = prepare_data(
        Data(train=[Source(path=str(tmp_path / "a.csv"))]), chat("chatml"), seed=0, wanted=wanted
    ).train
    assert example.columns == {"label": value == "true", "margin": 0.5, "rank": 7}


@pytest.mark.parametrize("one", [1, 1.0, True, np.int64(1), np.float32(1), np.bool_(True), "1", "1.0", "TRUE"])
def test_a_verdict_may_be_one_or_zero_as_a_number_or_a_text(chat, made, one):
    zero = type(one)(0) if not isinstance(one, str) else {"TRUE": "FALSE"}.get(one, one.replace("1", "0"))
    rows = [{"prompt": "q", "completion": f"a{i}", "label": label} for i, label in enumerate((one, zero))]
    prepared = made(rows, chat("chatml"), wanted=Wanted(kind="unpaired"))
    assert prepared.train.columns["label"].tolist() == [True, False] and prepared.train.columns["label"].dtype == bool
    assert not any("nothing reads" in warning for warning in prepared.report.warnings)


@pytest.mark.parametrize("rating", [2, -1, 0.5, "3", math.nan])
def test_a_rating_is_no_verdict(chat, made, rating):
    rows = [{"prompt": "q", "completion": "a", "label": rating}]
    with pytest.raises(LuthierError) as raised:
        made(rows, chat("chatml"), wanted=Wanted(kind="unpaired"))
    assert raised.value.code == "data-row" and raised.value.where.endswith(": label")
    assert "1 for a good answer" in raised.value.remedy


def test_a_column_of_truth_that_a_loss_names_itself_takes_no_number(chat, made):
    rows = [{"prompt": "q", "completion": "a", "label": 1}]
    with pytest.raises(LuthierError) as raised:
        made(rows, chat("chatml"), wanted=Wanted(kind="unpaired", columns={"label": "bool"}))
    assert raised.value.code == "data-row" and raised.value.where.endswith(": label")


@pytest.mark.parametrize("value", [True, 3, 0.5])
def test_an_answer_that_is_no_text_is_answered_with_the_template_that_makes_it_one(made, chat, value):
    rows = [{"prompt": "q", "chosen": value, "rejected": "no"}]
    with pytest.raises(LuthierError) as raised:
        made(rows, chat("chatml"), wanted=PAIRED)
    assert raised.value.code == "data-row" and raised.value.where.endswith(": chosen")
    assert 'template: {chosen: "{chosen}"}' in raised.value.remedy


def test_further_texts_of_the_row_become_documents_of_its_unit(chat, made):
    wanted = Wanted(kind="preference", documents={"hint": "note"})
    rows = [{"prompt": "q", "chosen": "c", "rejected": "r", "note": f"n{i}"} for i in range(2)]
    examples = made(rows, chat(None), wanted=wanted).train
    assert examples.names == ("chosen", "rejected", "hint")
    assert [texts(e, chat(None))["hint"] for e in examples] == ["<s>n0</s>", "<s>n1</s>"]
    with pytest.raises(LuthierError, match="note") as caught:
        made([*rows, {"prompt": "q", "chosen": "c", "rejected": "r"}], chat(None), wanted=wanted)
    assert caught.value.code == "data-column" and "[2]" in caught.value.where
