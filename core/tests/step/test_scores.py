"""Scores of rows: bootstrap intervals that are those of any order of rows, and cover what they should."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.step.evaluation.scores import Scores
from luthier.step.evaluation.unit_scores import add_terms, exponentiate_mean

numbers = st.floats(-10, 10, allow_nan=False)
tables = st.lists(st.tuples(numbers, st.floats(0.1, 5)), min_size=1, max_size=20).map(np.array)


@settings(max_examples=30, deadline=None)
@given(tables, st.integers(0, 9))
def test_an_interval_is_seeded_and_lies_among_the_rows_own_numbers(rows, seed):
    scores = Scores(rows=rows)
    low, high = scores.interval(seed, 50)
    assert (low, high) == Scores(rows=rows).interval(seed, 50)
    own = rows[:, 0] / rows[:, 1]
    assert own.min() - 1e-9 <= low <= high <= own.max() + 1e-9


@settings(max_examples=20, deadline=None)
@given(tables)
def test_the_difference_to_itself_is_nothing_whatever_is_drawn(rows):
    assert Scores(rows=rows).difference_interval(Scores(rows=rows.copy()), 0, 30) == (0.0, 0.0)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    random, covered = np.random.default_rng(0), 0
    for seed in range(200):
        values = random.normal(1.0, 2.0, 80)
        low, high = Scores(rows=np.stack([values, np.ones(80)], 1)).interval(seed, 200)
        covered += low <= 1.0 <= high
    assert 0.89 <= covered / 200 <= 0.98


def test_it_is_as_wide_as_the_normal_distribution_says():
    values = np.random.default_rng(1).normal(0.0, 1.0, 400)
    low, high = Scores(rows=np.stack([values, np.ones(400)], 1)).interval(0, 2000)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


def test_many_rows_are_drawn_in_pieces_that_change_nothing(monkeypatch):
    rows = np.random.default_rng(2).random((30, 2)) + 0.1
    whole = Scores(rows=rows).interval(3, 40)
    monkeypatch.setattr("luthier.step.evaluation.scores.PIECE", 31)
    assert Scores(rows=rows).interval(3, 40) == pytest.approx(whole)


def test_a_loss_of_several_terms_divides_each_by_its_own_weight():
    assert add_terms([6.0, 3.0, 1.0, 4.0, 9.0, 0.0]) == 2.25
    assert math.isnan(add_terms([1.0, 0.0]))
    assert exponentiate_mean([math.log(8.0) * 3, 3.0]) == pytest.approx(8.0)
