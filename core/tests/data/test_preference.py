"""Preference pairs as texts, messages and transcripts, with and without their prompt."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.formats.wanted import Wanted
from luthier.data.forms import Pair
from luthier.data.recognise import convert_row
from luthier.data.rows import Row

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
