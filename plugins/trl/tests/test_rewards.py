"""Rewards: found by name, given what they name, and held to a number for each answer."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier import LuthierError
from luthier_trl.plain_rewards import reward_distinct_words, reward_exact_match, reward_last_number
from luthier_trl.rewards import ROW, CheckedReward, find_reward, name_function, text_of

WHERE = "trainer.reward"
texts = st.lists(st.text(max_size=12), min_size=1, max_size=6)


def checked(function, columns=("answer",), name="mine"):
    return CheckedReward.of_function(name, function, columns)


def rows_of(count):
    return [f"rows.jsonl:{number + 1}" for number in range(count)]


@given(answers=texts, pad=st.sampled_from(["", " ", "\n"]))
def test_an_answer_that_is_the_reference_is_worth_one(answers, pad):
    assert reward_exact_match([text + pad for text in answers], answers) == [1.0] * len(answers)
    assert reward_exact_match([text + "x" for text in answers], answers) == [0.0] * len(answers)


@given(number=st.integers(-(10**6), 10**6), before=st.integers(0, 99))
def test_the_last_number_counts_however_it_is_written(number, before):
    said = f"first {before}, so it is {number:,}."
    assert reward_last_number([said, "none at all"], [f"#### {number}", str(number)]) == [1.0, 0.0]


@given(words=st.lists(st.sampled_from(("sun", "sea", "sky")), max_size=8))
def test_distinct_words_are_a_share(words):
    (share,) = reward_distinct_words([" ".join(words)])
    assert share == (len(set(words)) / len(words) if words else 0.0)


@given(answers=texts, repeats=st.integers(1, 3))
def test_a_reward_is_given_texts_and_the_columns_that_it_names(answers, repeats):
    seen = {}

    def reward(completions, prompts, level=0, missing="own"):
        seen.update(completions=completions, prompts=prompts, level=level, missing=missing)
        return [len(text) for text in completions]

    talk = [[{"role": "assistant", "content": text}] for text in answers]
    count = len(answers)
    values = checked(reward, ("answer", "level"))(
        completions=talk * repeats, prompts=answers * repeats, completion_ids=[], level=list(range(count)), answer=answers,
        **{ROW: rows_of(count)},
    )  # fmt: skip
    assert seen == {"completions": answers * repeats, "prompts": answers * repeats, "missing": "own",
                    "level": list(range(count)) * repeats}  # fmt: skip
    assert values == [float(len(text)) for text in answers] * repeats


def test_a_reward_that_takes_everything_is_given_every_column():
    assert checked(lambda completions, **more: [len(more)], ("answer", "level"))(
        completions=["a"], prompts=["b"], answer=["c"], level=[1], trainer_state=object(), **{ROW: rows_of(1)}
    ) == [3.0]


def raises(completions, answer):
    if "3" in answer:
        raise ZeroDivisionError("of three")
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "row", "problem"),
    [
        (raises, 3, "ZeroDivisionError: of three"),
        (lambda completions, answer: [math.nan if a == "2" else 0.0 for a in answer], 2, "not finite"),
        (lambda completions, answer: [math.inf if a == "4" else 0.0 for a in answer], 4, "not finite"),
        (lambda completions, answer: ["good" if a == "2" else 0.0 for a in answer], 2, "no number"),
        (lambda completions: [1.0], 1, "1 numbers for 4 answers"),
        (lambda completions: 3, 1, "TypeError"),
    ],
)
def test_a_reward_that_fails_names_itself_and_the_row(function, row, problem):
    with pytest.raises(LuthierError, match=problem) as caught:
        checked(function)(completions=list("abcd"), prompts=list("abcd"), answer=list("1234"), **{ROW: rows_of(4)})
    assert caught.value.where == f"reward 'mine': row rows.jsonl:{row}"


def test_none_is_no_opinion():
    assert checked(lambda completions: [None, 2])(completions=["a", "b"], prompts=["", ""]) == [None, 2.0]


def test_a_column_that_the_rows_lack_is_refused_by_name():
    with pytest.raises(LuthierError, match="'level', and the rows have none") as caught:
        checked(lambda completions, level: [0.0])
    assert "answer" in str(caught.value)


def test_a_reward_is_found_by_entry_point_by_path_and_as_a_function():
    assert find_reward("exact_match", WHERE) is reward_exact_match
    assert find_reward("luthier_trl.plain_rewards:reward_last_number", WHERE) is reward_last_number
    assert find_reward(name_function(raises), WHERE) is raises
    assert checked(raises, name=name_function(raises)).__name__ == "raises"


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("exact_mach", "part-unknown", "exact_match"),
        ("no_such_module:reward", "part-broken", "ModuleNotFoundError"),
        ("luthier_trl.rewards:GROUP", "part-invalid", "function"),
        ("python:elsewhere.reward", "part-unknown", "Pass the function again"),
    ],
)
def test_a_reward_that_is_not_there_is_refused_with_the_reason(name, code, told):
    with pytest.raises(LuthierError, match=told) as caught:
        find_reward(name, WHERE)
    assert caught.value.code == code


def test_the_text_of_an_answer_is_that_of_its_messages():
    assert text_of("plain") == "plain"
    assert text_of([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": None}]) == "a"
