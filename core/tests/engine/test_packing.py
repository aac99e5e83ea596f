"""Packing and order: everything once, under the limit, the same every time."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from luthier.data.order import Order, permutation
from luthier.data.pack import pack


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.integers(1, 60), max_size=80), st.integers(60, 200))
def test_every_example_is_packed_once_under_the_limit(lengths, limit):
    bins = pack(lengths, limit)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in b) <= limit for b in bins)
    assert len(bins) >= -(-sum(lengths) // limit)
    assert bins == pack(lengths, limit)


@pytest.mark.parametrize(("count", "limit", "upstream"), [(128, 8192, 39), (1024, 16384, 140), (256, 8192, 78)])
def test_uniform_lengths_need_hardly_more_bins_than_their_sum(count, limit, upstream):
    lengths = np.random.default_rng(0).integers(16, 4096, count).tolist()
    bins = pack(lengths, limit)
    assert len(bins) <= -(-sum(lengths) // limit) + 1
    assert len(bins) < upstream


def test_bins_are_balanced_where_the_longest_first_rule_fits():
    lengths = np.random.default_rng(1).integers(10, 200, 300).tolist()
    loads = [sum(lengths[i] for i in b) for b in pack(lengths, 4096)]
    assert max(loads) - min(loads) <= 200


def test_an_example_longer_than_the_limit_is_refused():
    with pytest.raises(AssertionError):
        pack([5, 11], 10)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 5), st.integers(0, 30))
def test_the_order_of_a_step_does_not_depend_on_where_reading_began(size, batch, seed, first):
    order = Order(size=size, batch=batch, seed=seed)
    whole = {step: rows.tolist() for step, rows in order.steps(40)}
    for step, rows in order.steps(40, first=first):
        assert rows.tolist() == whole[step]


def test_an_epoch_reads_every_example_once_and_the_next_in_another_order():
    order = Order(size=25, batch=4, seed=3)
    steps = [rows.tolist() for _, rows in order.steps(2 * order.steps_per_epoch)]
    first, second = steps[: order.steps_per_epoch], steps[order.steps_per_epoch :]
    assert sorted(i for s in first for i in s) == sorted(i for s in second for i in s) == list(range(25))
    assert first != second
    assert [len(s) for s in first] == [4] * 6 + [1]
    assert permutation(25, 3, 0).tolist() != permutation(25, 4, 0).tolist()
