"""Rewards: found by name, given what they name, and held to a number for each answer."""

import copy
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier import LuthierError, PromptRow
from luthier.testing import expect_error
from luthier_trl.plain_rewards import reward_distinct_words, reward_exact_match, reward_last_number
from luthier_trl.rewards import ROW, CheckedReward, check_names, find_reward, name_function, text_of

WHERE = "trainer.reward"
texts = st.lists(st.text(max_size=12), min_size=1, max_size=6)


def rows_of(prompts, **columns):
    """A row for each prompt, and the prompts of it."""
    cells = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [PromptRow(prompt=prompt, columns=cells[place] if cells else {}, where=f"rows.jsonl:{place + 1}")
            for place, prompt in enumerate(prompts)]  # fmt: skip


def checked(function, rows=None, name="mine"):
    return CheckedReward.of_function(name, function, rows or rows_of("abcd", answer="1234"))


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
    rows = rows_of(answers, level=range(count), answer=answers)
    told = {"completion_ids": [], "prompts": ["as TRL has it"] * count, ROW: list(range(count))}
    values = checked(reward, rows)(completions=talk * repeats, **told)
    assert seen == {"completions": answers * repeats, "prompts": answers * repeats, "missing": "own",
                    "level": list(range(count)) * repeats}  # fmt: skip
    assert values == [float(len(text)) for text in answers] * repeats


def test_a_reward_that_takes_everything_is_given_every_column():
    rows = rows_of("b", answer="c", level=[1])
    reward = checked(lambda completions, **more: [len(more)], rows)
    assert reward(completions=["a"], trainer_state=object(), **{ROW: [0]}) == [3.0]


cells = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(values=st.lists(cells, min_size=1, max_size=4), drawn=st.data())
def test_a_column_reaches_the_reward_as_it_stands_in_the_row_and_is_its_own(values, drawn):
    seen = []

    def reward(completions, completion):
        seen.append(copy.deepcopy(completion))
        for value in completion:
            if isinstance(value, (dict, list)):
                value.clear()
        return [0.0] * len(completions)

    numbers = drawn.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=6))
    made = checked(reward, rows_of("a" * len(values), completion=values))
    for _ in range(2):
        made(completions=["x"] * len(numbers), **{ROW: numbers})
    wanted = [values[number] for number in numbers]
    assert [list(map(repr, column)) for column in seen] == [list(map(repr, wanted))] * 2  # 1, 1.0 and True are equal


def test_a_row_that_lacks_a_column_of_others_has_none():
    rows = [PromptRow(prompt="a", columns={"level": 1}, where="1"), PromptRow(prompt="b", columns={}, where="2")]
    reward = checked(lambda completions, level: [-1 if each is None else each for each in level], rows)
    assert reward(completions=["x", "y"], **{ROW: [1, 0]}) == [-1.0, 1.0]


def raises(completions, answer):
    if "3" in answer:
        raise ZeroDivisionError("of three")
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "row", "problem"),
    [
        (raises, 3, ("reward 'mine': row rows.jsonl:3", "ZeroDivisionError")),
        (
            lambda completions, answer: [math.nan if a == "2" else 0.0 for a in answer],
            2,
            ("reward 'mine': row rows.jsonl:2",),
        ),
        (
            lambda completions, answer: [math.inf if a == "4" else 0.0 for a in answer],
            4,
            ("reward 'mine': row rows.jsonl:4",),
        ),
        (
            lambda completions, answer: ["good" if a == "2" else 0.0 for a in answer],
            2,
            ("reward 'mine': row rows.jsonl:2",),
        ),
        (lambda completions: [1.0], 1, ("reward 'mine': row rows.jsonl:1", "4")),
        (lambda completions: 3, 1, ("TypeError",)),
    ],
)
def test_a_reward_that_fails_names_itself_and_the_row(function, row, problem):
    with pytest.raises(LuthierError) as caught:
        checked(function)(completions=list("abcd"), **{ROW: [0, 1, 2, 3]})
    assert all(fact in str(caught.value) for fact in problem)
    assert caught.value.where == f"reward 'mine': row rows.jsonl:{row}"


def test_none_is_no_opinion():
    assert checked(lambda completions: [None, 2])(completions=["a", "b"], **{ROW: [0, 1]}) == [None, 2.0]


def test_a_column_that_the_rows_lack_is_refused_by_name():
    with expect_error("data-column", "trainer.reward", "'level'") as caught:
        checked(lambda completions, level: [0.0])
    assert "answer" in str(caught.value)


def test_a_reward_is_found_by_entry_point_by_path_and_as_a_function():
    assert find_reward("exact_match", WHERE) is reward_exact_match
    assert find_reward("luthier_trl.plain_rewards:reward_last_number", WHERE) is reward_last_number
    assert find_reward(name_function(raises), WHERE) is raises
    assert checked(raises, name=name_function(raises)).__name__ == "raises"


def test_functions_of_one_name_are_told_apart_and_a_function_keeps_its_name():
    def factory(value):
        def reward(completions):
            return [value] * len(completions)

        return reward

    class Judge:
        def judge(self, completions):
            return [0.0] * len(completions)

    one, other, judges = factory(1.0), factory(2.0), (Judge(), Judge())
    functions = [one, other, lambda completions: [3.0], lambda completions: [4.0], *(each.judge for each in judges)]
    names = [name_function(function) for function in functions]
    assert [find_reward(name, WHERE) for name in names] == functions
    assert len(set(names)) == len(names)
    assert names[1] == f"{names[0]}#2"
    assert [name_function(function) for function in (one, other, judges[1].judge)] == [names[0], names[1], names[5]]
    check_names(names, WHERE)  # nor does TRL report two under one name


HOME = "luthier_trl.plain_rewards"


@pytest.mark.parametrize(
    "names",
    [
        ["exact_match", "exact_match"],
        ["exact_match", "last_number", "exact_match"],
        [f"{HOME}:reward_exact_match", f"python:{HOME}.reward_exact_match"],
    ],
)
def test_rewards_whose_numbers_would_come_under_one_name_are_refused(names):
    name_function(reward_exact_match)
    with pytest.raises(LuthierError) as caught:
        check_names(names, WHERE)
    assert (caught.value.code, caught.value.where) == ("recipe-conflict", WHERE)


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("exact_mach", "part-unknown", ("exact_match",)),
        ("no_such_module:reward", "part-broken", ("ModuleNotFoundError",)),
        ("luthier_trl.rewards:GROUP", "part-invalid", ("function",)),
        ("python:elsewhere.reward", "part-unknown", ("trainer.reward",)),
    ],
)
def test_a_reward_that_is_not_there_is_refused_with_the_reason(name, code, told):
    with pytest.raises(LuthierError) as caught:
        find_reward(name, WHERE)
    assert all(fact in str(caught.value) for fact in told)
    assert caught.value.code == code


def test_the_text_of_an_answer_is_that_of_its_messages():
    assert text_of("plain") == "plain"
    assert text_of([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": None}]) == "a"
