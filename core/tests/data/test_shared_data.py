"""The real data sets: each file reads, is recognised or refused for the right reason, and is tokenised."""

from __future__ import annotations

import pytest
from luthier import LuthierError
from luthier.data.formats.recognise_form import convert_row, recognise_format
from luthier.data.formats.wanted import Wanted
from luthier.data.prepare import prepare_data
from luthier.data.read.sources import read_source
from luthier.recipe.schema import Data, Source

QA = {"prompt": "question", "completion": "answer"}
STATEMENT = {"prompt": "question", "completion": "answer_matching_behavior"}
TRAINED = [  # file, format, rows, columns
    ("gpteacher/roleplay_alpaca.json.gz", "alpaca", 2674, {}),
    ("gpteacher/codegen_response_key.jsonl.gz", "alpaca", 3990, {}),
    ("gpteacher_toolformer_neardup/toolformer.jsonl.gz", "alpaca", 6818, {}),
    ("provider_samples/tinker_conversations.jsonl", "messages", 102, {}),
    ("provider_samples/fireworks_text2sql.jsonl", "messages", 80, {}),
    ("provider_samples/openai_toy_chat.jsonl", "messages", 5, {}),
    ("provider_samples/datajuicer_chatml_zh.jsonl", "messages", 4, {}),
    ("provider_samples/openai_drone_tools.jsonl", "messages", 82, {}),
    ("taskmaster4/dialogs_messages.jsonl.gz", "messages", 520, {}),
    ("sharegpt/fastchat_identity.json", "sharegpt", 400, {}),
    ("sharegpt/glaive_toolcall_en.json", "sharegpt", 220, {}),
    ("sharegpt/glaive_toolcall_zh.json", "sharegpt", 180, {}),
    ("mlx_samples/superbowl_prompt_completion.jsonl.gz", "prompt_completion", 1551, {}),
    ("mlx_samples/wikisql_text_train.jsonl", "text", 1000, {}),
    ("mlx_samples/wikisql_text_valid.jsonl", "text", 100, {}),
    ("web_text/c4.jsonl", "text", 220, {}),
    ("dclm_quality/quality.jsonl.gz", "text", 379, {}),
    ("noisy_web_derived/noisy.jsonl", "text", 275, {}),
    ("datajuicer_dedupe_demo/dedupe_demo.jsonl", "text", 14, {}),
    ("provider_samples/derived_chatml.txt", "chatml", 102, {}),
    ("gsm8k/train.jsonl.gz", "prompt_completion", 6973, QA),
    ("gsm8k/test.jsonl", "prompt_completion", 660, QA),
    ("cl_tasks/mnli/train.jsonl.gz", "prompt_completion", None, {"prompt": "sentence", "completion": "label"}),
    ("cl_tasks/boolq/test.jsonl", "prompt_completion", None, {"prompt": "sentence", "completion": "label"}),
    ("anthropic_persona/neuroticism.jsonl", "prompt_completion", None, STATEMENT),
]
PAIRED = Wanted(kind="preference")
PAIRS = [("fireworks_orpo_ifeval/orpo_ifeval.jsonl.gz", 75)]
PLAIN = [("tinyshakespeare/input_first90.txt", "paragraph"), ("web_text/wikipedia.txt", "line"), ("wikitext2/valid.txt", "paragraph"),
         ("wikitext2/test_first30.txt", "line"), ("names/names.txt", "line")]  # fmt: skip
NO_FORMAT = ["self_instruct/seed_tasks.jsonl", "pandalm/testset_v1.jsonl.gz", "taskmaster4/reward_binary.jsonl.gz",
             "gsm8k/test.jsonl", "svamp/svamp.jsonl", "human_eval/human_eval.jsonl"]  # fmt: skip
NO_ANSWER = ["provider_samples/fireworks_deepmath_rl.jsonl", "provider_samples/fireworks_countdown_rl.jsonl"]


def source(path, **options):
    return Source(path="${LUTHIER_DATA}/" + path, **options)


@pytest.mark.parametrize(("path", "form", "count", "columns"), TRAINED)
def test_every_row_is_read_recognised_and_converted(path, form, count, columns, shared_data):
    rows = list(read_source(source(path, columns=columns)))
    assert recognise_format(rows, path, set(columns)) == form
    assert len([convert_row(row, form) for row in rows]) == (count or len(rows))


@pytest.mark.parametrize(("path", "form", "count", "columns"), TRAINED)
def test_first_rows_are_tokenised_with_their_answers_supervised(path, form, count, columns, shared_data, chat, answers):
    tokenizer = chat("qwen")
    data = Data(train=[source(path, columns=columns, max_rows=20)], max_length=200_000)
    prepared = prepare_data(data, tokenizer, seed=0)
    assert prepared.report.format == form and prepared.report.examples == prepared.report.rows
    stop = "</s>" if form in ("text", "prompt_completion") else "<|im_end|>"
    for example in prepared.train:
        found = answers(example, tokenizer)
        assert found and all(text.endswith(stop) for text in found)


@pytest.mark.parametrize(("path", "unit"), PLAIN)
def test_plain_text_is_prepared_whole(path, unit, shared_data, chat):
    report = prepare_data(Data(train=[source(path, max_rows=400)], text_unit=unit), chat(None), seed=0).report
    assert report.format == "text" and report.examples >= report.rows and not report.drops


@pytest.mark.parametrize(("path", "count"), PAIRS)
def test_pairs_have_a_prompt_and_two_answers(path, count, shared_data, chat, answers):
    tokenizer = chat("qwen")
    data = Data(train=[source(path)], max_length=200_000)
    pairs = prepare_data(data, tokenizer, seed=0, wanted=PAIRED).train
    assert len(pairs) == count and pairs.names == ("chosen", "rejected")
    sides = [(side, answers(side, tokenizer)) for pair in pairs for side in pair.by_name().values()]
    assert all(len(found) == 1 and found[0] in tokenizer.decode(side.input_ids) for side, found in sides)
    assert any("<think>" in found[0] for _, found in sides)


def test_a_broken_pair_of_a_real_file_is_named(shared_data, chat):
    with pytest.raises(LuthierError, match="True") as caught:
        prepare_data(Data(train=[source("pandalm/derived_pairs.jsonl")]), chat(None), seed=0, wanted=PAIRED)
    assert caught.value.code == "data-row" and "derived_pairs.jsonl:101" in caught.value.where
    kept = prepare_data(
        Data(train=[source("pandalm/derived_pairs.jsonl", max_rows=100)]), chat(None), seed=0, wanted=PAIRED
    )
    assert kept.report.rows == 100


@pytest.mark.parametrize("path", NO_FORMAT)
def test_a_file_of_another_shape_is_refused_with_its_columns(path, shared_data, chat):
    with pytest.raises(LuthierError, match="columns") as caught:
        prepare_data(Data(train=[source(path)]), chat("qwen"), seed=0)
    assert caught.value.code == "data-format"


@pytest.mark.parametrize("path", NO_ANSWER)
def test_prompts_without_answer_are_refused_by_their_first_row(path, shared_data, chat):
    with pytest.raises(LuthierError) as caught:
        prepare_data(Data(train=[source(path)]), chat("qwen"), seed=0)
    assert caught.value.code == "data-unsupervised" and caught.value.where.endswith(".jsonl:1")


def test_chatml_text_and_the_messages_it_was_made_from_give_the_same_tokens(shared_data, chat):
    sets = [
        prepare_data(Data(train=[source(f"provider_samples/{name}")]), chat("chatml"), seed=0).train
        for name in ("derived_chatml.txt", "tinker_conversations.jsonl")
    ]
    assert sets[0].fingerprint == sets[1].fingerprint
