"""Rows as prompts: each once, with its other columns; of a conversation, what stands before the last answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.prompt_rows import read_prompts
from luthier.recipe.schema import Data, Source

texts = st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=8)


@given(rows=st.lists(st.tuples(texts, texts), min_size=2, max_size=9), share=st.sampled_from((0.0, 0.3, 0.5)))
def test_every_row_is_a_prompt_once_with_its_columns(rows, share):
    data = Data(train=[Source(path="rows")], validation=share)
    given_rows = [{"prompt": prompt, "answer": answer} for prompt, answer in rows]
    train_rows, held = read_prompts(data, given_rows, None, seed=0)
    assert sorted((row.prompt, row.columns["answer"]) for row in (*train_rows, *held)) == sorted(rows)
    assert bool(held) == (share > 0)


@given(talk=st.lists(texts, min_size=1, max_size=4))
def test_the_prompt_of_a_conversation_is_what_stands_before_its_last_answer(talk):
    messages = [
        {"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate([*talk, "end"])
    ]
    if len(messages) % 2:
        messages.append({"role": "assistant", "content": "end"})
    data = Data(train=[Source(path="rows")])
    ((row,), _) = read_prompts(data, [{"messages": messages, "level": 3}], None, seed=0)
    assert row.prompt == messages[:-1]
    assert row.columns == {"level": 3}


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([{"prompt": ""}], "data-row"),
        ([{"prompt": ["a"]}], "data-row"),
        ([{"text": "a story"}], "data-format"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}], "data-format"),
        ([{"messages": [{"role": "assistant", "content": "an answer alone"}]}], "data-row"),
    ],
)
def test_rows_of_which_no_prompt_can_be_told_are_refused(rows, code):
    with pytest.raises(LuthierError) as caught:
        read_prompts(Data(train=[Source(path="rows")]), rows, None, seed=0)
    assert caught.value.code == code
