"""Preparing: what is dropped, cut, split and held out, everything counted; and the checks before training."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.examples import IGNORED, TokenDataset, TokenExample
from luthier.data.prepare import check_token_ids, prepare_data
from luthier.recipe.schema import Data, Source
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

QUIET = settings(max_examples=25, deadline=None)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def texts(*lengths):
    return [{"text": chr(97 + i % 26) * length} for i, length in enumerate(lengths)]


def refused(code, run, *arguments, **options):
    with pytest.raises(LuthierError) as caught:
        run(*arguments, **options)
    assert caught.value.code == code
    return caught.value


@QUIET
@given(lengths=LENGTHS, limit=st.integers(2, 30))
def test_splitting_keeps_every_token_in_rows_no_longer_than_the_limit(lengths, limit, chat, made):
    try:
        prepared = made(texts(*lengths), chat(None), max_length=limit)
    except LuthierError as error:
        assert error.code == "data-empty"
        return
    whole = made(texts(*lengths), chat(None), max_length=100)
    lost = whole.report.tokens - prepared.report.tokens
    assert prepared.train.lengths.max() <= limit and (prepared.train.num_supervised > 0).all()
    assert lost == prepared.report.drops["split_unsupervised"]  # parts of one token have nothing to predict
    missing = Counter(whole.train.input_ids.tolist()) - Counter(prepared.train.input_ids.tolist())
    assert missing.total() == lost


@QUIET
@given(lengths=LENGTHS, limit=st.integers(2, 30))
def test_dropping_leaves_short_rows_alone_and_counts_the_others(lengths, limit, chat, made):
    long = sum(length + 2 > limit for length in lengths)
    rows = [{"prompt": "", "completion": row["text"]} for row in texts(*lengths)]
    if long == len(lengths):
        assert "overlong" in refused("data-empty", made, rows, chat(None), max_length=limit).problem
        return
    prepared = made(rows, chat(None), max_length=limit)
    assert prepared.report.drops == ({"overlong": long} if long else {})
    assert prepared.report.examples == len(lengths) - long == len(prepared.train)


def test_a_truncated_example_keeps_the_part_of_its_answer_that_fits(chat, made):
    rows = [{"prompt": "ab", "completion": "cdefgh"}, {"prompt": "abcdefgh", "completion": "i"}]
    prepared = made(rows, chat(None), max_length=6, overlong="truncate")
    example = prepared.train[0]
    assert len(prepared.train) == 1 and (example.labels != IGNORED).tolist() == [False] * 3 + [True] * 3
    assert prepared.report.changes == {"truncated": 1} and prepared.report.drops == {"truncated_unsupervised": 1}
    assert prepared.report.warnings == [
        "1 of 2 rows (50.0 %) were dropped: truncated_unsupervised 1",
        "1 of 2 rows (50.0 %) were cut to max_length",
    ]


def test_overlong_error_names_the_row_and_both_lengths(chat, made):
    error = refused("data-overlong", made, texts(3, 9), chat(None), max_length=6, overlong="error")
    assert error.where == "data[1]" and "11" in error.problem and "6" in error.problem


@pytest.mark.parametrize(
    "row", [{"prompt": "a", "completion": "b"}, {"messages": [{"role": "assistant", "content": "a"}]}]
)
def test_rows_with_an_answer_are_never_split(row, chat, made):
    error = refused("recipe-conflict", made, [row], chat("chatml"), overlong="split")
    assert "drop, truncate or error" in error.remedy


def test_pretokenised_rows_are_split_with_their_labels_and_left_as_they_are(chat, made):
    ids = list(range(10, 20))
    rows = [{"input_ids": ids, "labels": [IGNORED] * 5 + ids[5:], "len": 10}]
    whole = made(rows, chat(None)).train
    assert (whole[0].input_ids.tolist(), whole[0].labels.tolist()) == (ids, rows[0]["labels"])
    parts = made(rows, chat(None), max_length=4)
    assert [part.input_ids.tolist() for part in parts.train] == [ids[4:8], ids[8:]]
    assert parts.report.drops == {"split_unsupervised": 1}


UNSUPERVISED = [
    {"messages": [{"role": "user", "content": "a"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
    {"prompt": "a", "completion": ""},
    {"instruction": "a", "input": "", "output": ""},
    {"text": " "},
    {"input_ids": [5, 6], "labels": [IGNORED, IGNORED]},
    {"input_ids": [5, 6], "labels": [5, IGNORED]},
    {"input_ids": [5]},
]


@pytest.mark.parametrize("row", UNSUPERVISED)
def test_a_row_without_supervised_token_is_an_error_or_a_counted_drop(row, chat, made):
    good = {
        "messages": [{"role": "assistant", "content": "a"}],
        "completion": "b",
        "output": "b",
        "text": "a",
        "input_ids": [5, 6],
    }
    rows = [{**row, **{k: v for k, v in good.items() if k in row}}, row]
    rows[0].pop("labels", None)
    error = refused("data-unsupervised", made, rows, chat("chatml"))
    assert error.where == "data[1]"
    report = made(rows, chat("chatml"), unsupervised="drop").report
    assert (report.examples, report.drops) == (1, {"unsupervised": 1})


def test_nothing_left_is_an_error_that_says_why(chat, made):
    error = refused("data-empty", made, UNSUPERVISED[:1] * 3, chat("chatml"), unsupervised="drop")
    assert "unsupervised: 3" in error.problem
    refused("data-empty", made, [], chat(None))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 40), share=st.floats(0.001, 0.5), seed=st.integers(0, 5))
def test_a_share_of_the_rows_is_held_out_by_the_seed_before_any_is_split(count, share, seed, chat, made):
    rows = [{"text": f"{i:03d}" * 3} for i in range(count)]
    prepared = made(rows, chat(None), validation=share, seed=seed, max_length=8)
    found = [{example.where for example in part} for part in (prepared.train, prepared.validation)]
    assert not found[0] & found[1] and found[0] | found[1] == {f"data[{i}]" for i in range(count)}
    assert len(found[1]) == max(1, round(share * count)) == prepared.report.validation.rows
    again = made(rows, chat(None), validation=share, seed=seed, max_length=8)
    assert again.train.fingerprint == prepared.train.fingerprint
    if count > 20:
        other = made(rows, chat(None), validation=share, seed=seed + 1, max_length=8)
        assert {e.where for e in other.validation} != found[1]


def test_one_row_is_not_divided_and_a_share_is_at_most_half(chat, made):
    assert refused("data-empty", made, texts(3), chat(None), validation=0.1).where == "data.validation"
    assert refused("recipe-out-of-range", made, texts(3, 4), chat(None), validation=0.6).where == "data.validation"


def test_rows_that_are_all_bad_are_named_before_a_share_of_them_is_held_back(chat, made):
    rows = [{"prompt": "a", "completion": 1}, {"prompt": "b", "completion": 2}]
    assert refused("data-row", made, rows, chat(None), validation=0.1).where.startswith("data[0]")


def test_validation_may_have_sources_or_rows_of_its_own(chat, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "train"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "held"}\n')
    sources = {name: [Source(path=str(tmp_path / f"{name}.jsonl"))] for name in "ab"}
    from_file = prepare_data(Data(train=sources["a"], validation=sources["b"]), chat(None), seed=0)
    from_rows = prepare_data(Data(train=sources["a"]), chat(None), seed=0, given_validation=[{"text": "held"}])
    for prepared in (from_file, from_rows):
        assert chat(None).decode(prepared.validation[0].input_ids) == "<s>held</s>"
        assert prepared.report.rows == prepared.report.validation.rows == 1


def test_validation_examples_that_are_trained_on_are_told(chat, made):
    assert made(texts(3, 4, 5, 6), chat(None), validation=0.5).report.warnings == []
    prepared = made(texts(3, 3) + texts(3, 3), chat(None), validation=0.25)
    assert prepared.report.warnings == ["1 of 1 validation examples are training examples too"]


def test_sources_of_unlike_formats_are_recognised_one_by_one(chat, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    sources = [
        Source(path=str(tmp_path / "a.txt")),
        Source(path=str(tmp_path / "b.jsonl"), columns={"prompt": "question", "completion": "answer"}),
    ]
    prepared = prepare_data(Data(train=sources), chat(None), seed=0)
    assert [chat(None).decode(e.input_ids) for e in prepared.train] == ["<s>one</s>", "<s>two</s>", "<s>qa</s>"]
    assert prepared.report.format == "text, prompt_completion"


def test_a_set_format_is_not_recognised_but_held_to(chat, made):
    row = {"instruction": "a", "output": "b", "text": "c"}
    assert made([row], chat(None), format="text").report.format == "text"
    error = refused("data-row", made, [row, {"instruction": "a"}], chat(None), format="alpaca")
    assert error.where == "data[1]"


def test_given_rows_take_the_columns_of_the_recipes_source(chat):
    data = Data(train=[Source(path="rows", columns={"prompt": "q", "completion": "a"})])
    prepared = prepare_data(data, chat(None), seed=0, given=[{"q": "x", "a": "y"}])
    assert chat(None).decode(prepared.train[0].input_ids) == "<s>xy</s>"


def test_alpaca_goes_through_the_chat_template_or_the_classic_prompt(chat, made, answers):
    rows = [{"instruction": "Add {input}.", "input": "2 3", "output": "5"}, {"instruction": "Hi", "output": "Ho"}]
    with_template = made(rows, chat("chatml")).train
    assert "<|im_start|>user\nAdd {input}.\n\n2 3<|im_end|>" in chat("chatml").decode(with_template[0].input_ids)
    assert answers(with_template[0], chat("chatml")) == ["5<|im_end|>"]
    classic = [chat(None).decode(example.input_ids) for example in made(rows, chat(None)).train]
    assert classic[0].endswith("### Instruction:\nAdd {input}.\n\n### Input:\n2 3\n\n### Response:\n5</s>")
    assert classic[1].endswith("appropriately completes the request.\n\n### Instruction:\nHi\n\n### Response:\nHo</s>")


def test_prompt_and_completion_are_plain_text_even_where_there_is_a_template(chat, made):
    rows = [{"prompt": "a", "completion": "b"}]
    assert made(rows, chat("chatml")).train.fingerprint == made(rows, chat(None)).train.fingerprint
    messages = [{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}]
    assert "<|im_start|>" in chat("chatml").decode(made(messages, chat("chatml")).train[0].input_ids)


def test_train_on_all_supervises_the_prompt_too(chat, made):
    example = made([{"prompt": "a", "completion": "b"}], chat(None), train_on="all").train[0]
    np.testing.assert_array_equal(example.labels[1:], example.input_ids[1:])
    unanswered = made([{"messages": [{"role": "user", "content": "a"}]}], chat("chatml"), train_on="all")
    assert unanswered.report.supervised_tokens == unanswered.report.tokens - 1


@QUIET
@given(lengths=LENGTHS)
def test_the_report_adds_up(lengths, chat, made):
    prepared = made(texts(*lengths), chat(None))
    report, train = prepared.report, prepared.train
    assert (report.rows, report.examples, report.tokens) == (len(lengths), len(train), sum(lengths) + 2 * len(lengths))
    assert report.supervised_tokens == int(train.num_supervised.sum()) == sum(lengths) + len(lengths)
    assert report.lengths["p0"] == min(lengths) + 2 and report.lengths["p100"] == max(lengths) + 2
    assert sum(count for *_, count in report.histogram) == len(train) and len(report.histogram) <= 12
    for low, high, count in report.histogram:
        assert count == ((train.lengths >= low) & (train.lengths <= high)).sum()
    assert json.loads(json.dumps(report.to_dict()))["tokens"] == report.tokens


def test_progress_counts_every_row_of_both_sets(chat):
    seen = []
    rows = texts(*[3] * 600)
    prepare_data(
        Data(train=[Source(path="rows")], validation=0.1),
        chat(None),
        seed=0,
        given=rows,
        progress=lambda *at: seen.append(at),
    )
    assert seen == sorted(seen) and seen[-1] == (600, 600) and len(seen) >= 3


def test_stop_tokens_are_those_that_answers_end_with(chat, made):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    for template, stop in (("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("bare", "</s>")):
        prepared = made(rows, chat(template))
        assert prepared.stop_tokens == (chat(template).convert_tokens_to_ids(stop),)
    assert made([{"text": "a"}], chat("chatml")).stop_tokens == (2,)
    assert made([{"input_ids": [50, 51]}], chat("chatml")).stop_tokens == ()


def test_an_id_that_the_model_has_not_is_an_error_with_its_row(chat, made):
    dataset = made([{"text": "ab"}, {"text": "cé"}], chat(None)).train
    check_token_ids(dataset, chat(None), int(dataset.input_ids.max()) + 1)
    error = refused("model-vocabulary", check_token_ids, dataset, chat(None), int(dataset.input_ids.max()))
    assert error.where == "data[1]" and f"token {dataset.input_ids.max()} (" in error.problem


@pytest.mark.parametrize(("ids", "labels"), [([5, -3], [5, 5]), ([5, 6], [5, -3]), ([5, 6], [5, 999])])
def test_negative_ids_and_foreign_labels_are_outside_of_every_vocabulary(ids, labels, chat):
    example = TokenExample(input_ids=np.array(ids, np.int32), labels=np.array(labels, np.int32), where="a.jsonl:3")
    error = refused("model-vocabulary", check_token_ids, TokenDataset.of([example]), chat(None), 100)
    assert error.where == "a.jsonl:3"


def test_datasets_objects_prepare_as_their_rows_do(chat, made):
    import datasets

    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    table = datasets.Dataset.from_list(rows)
    wanted = made(rows, chat("chatml")).train.fingerprint
    assert made(table, chat("chatml")).train.fingerprint == wanted
    assert made(table.to_iterable_dataset(), chat("chatml")).train.fingerprint == wanted
    refused("data-unreadable", made, datasets.DatasetDict(train=table), chat("chatml"))


def test_a_files_rows_are_read_once_so_that_even_a_pipe_can_be_a_source(chat, tmp_path):
    path = tmp_path / "rows.jsonl"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text('{"text": "abc"}\n' * 600))
    writer.start()
    made = prepare_data(Data(train=[Source(path=str(path))], cache=False, num_proc=1), chat("chatml"), seed=0)
    writer.join()
    assert len(made.train) == 600


def test_a_format_is_recognised_behind_a_hundred_rows_that_hold_nothing(chat, made):
    assert made([{"text": ""}] * 150 + [{"text": "abc"}] * 2, chat("chatml"), bad_rows="drop").report.examples == 2


def test_a_row_of_which_the_tokenizer_makes_nothing_has_no_supervised_token(made):
    """A post-processor without a place for the text drops all of it."""
    core = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    core.post_processor = processors.TemplateProcessing(single="</s>", special_tokens=[("</s>", 1)])
    template = "{% for message in messages %}{{ message.content }}</s>{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", chat_template=template)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    refused("data-unsupervised", made, [{"messages": talk}], tokenizer)
