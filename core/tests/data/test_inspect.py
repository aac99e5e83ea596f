"""Inspection: what it shows is what the loss sees."""

from __future__ import annotations

import json

from luthier.data.formats.wanted import Wanted
from luthier.data.inspect_examples import inspect

ROWS = [
    {"messages": [{"role": "user", "content": f"q{i} é"}, {"role": "assistant", "content": "漢" * i or "none"}]}
    for i in range(5)
]


def test_the_pieces_are_the_text_in_order_and_the_supervised_ones_the_answers(chat, made):
    tokenizer = chat("chatml")
    prepared = made(ROWS, tokenizer)
    shown = inspect(prepared, tokenizer, rows=4)
    assert len(shown.examples) == 4
    for example, token_example in zip(shown.examples, prepared.train, strict=False):
        assert "".join(text for text, _ in example.pieces) == tokenizer.decode(token_example.input_ids)
        assert example.supervised_tokens == token_example.num_supervised and example.where == token_example.where
    assert [text for text, on in shown.examples[2].pieces if on] == ["漢漢<|im_end|>"]


def test_a_first_token_is_shown_unsupervised_for_nothing_predicts_it(chat, made):
    shown = inspect(made([{"text": "ab"}], chat(None)), chat(None))
    assert shown.examples[0].pieces == (("<s>", False), ("ab</s>", True))


def test_it_carries_shares_drops_and_lengths_as_plain_json(chat, made):
    prepared = made(
        [*ROWS, {"messages": [{"role": "user", "content": "a"}]}], chat("chatml"), unsupervised="drop", validation=0.3
    )
    shown = json.loads(json.dumps(inspect(prepared, chat("chatml")).to_dict()))
    assert shown["supervised_share"] == prepared.report.supervised_tokens / prepared.report.tokens
    assert shown["report"]["rows"] + shown["report"]["validation"]["rows"] == 6
    assert shown["report"]["dropped"] + shown["report"]["validation"]["dropped"] == 1
    assert shown["report"]["histogram"] and shown["chat_template_hash"] == prepared.chat_template_hash


def test_asking_for_more_examples_than_there_are_shows_all(chat, made):
    assert len(inspect(made(ROWS, chat("chatml")), chat("chatml"), rows=99).examples) == 5


def test_a_pair_shows_prompt_chosen_and_rejected(chat, made):
    pair = {"prompt": "p", "chosen": [{"role": "assistant", "content": "c"}], "rejected": "r", "margin": 0.5}
    prepared = made([pair], chat("chatml"), wanted=Wanted(kind="preference", columns={"margin": "float"}))
    shown = inspect(prepared, chat("chatml")).examples[0]
    prompt = "<s><|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"
    assert [d.name for d in shown.documents] == ["chosen", "rejected"] and shown.columns == {"margin": 0.5}
    for document, answer in zip(shown.documents, "cr", strict=True):
        assert document.pieces[:2] == ((prompt, False), (f"{answer}<|im_end|>", True))
