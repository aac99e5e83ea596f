"""Packing and order: everything once, under the limit, balanced over the ranks, the same every time."""

import heapq
import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from luthier.data.batches.packing import Packing, measure_imbalance, pack, pack_ranks
from luthier.data.batches.row_order import Order, order_rows


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


RANKS = st.integers(1, 9)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.integers(1, 60), max_size=80), st.integers(60, 200), RANKS)
def test_every_rank_has_as_many_micro_batches_and_no_bin_is_over_the_limit(lengths, limit, ranks):
    found = pack_ranks(lengths, limit, ranks)
    assert sorted(i for bins in found for b in bins for i in b) == list(range(len(lengths)))
    assert all(len(bins) == ranks for bins in found)
    assert all(sum(lengths[i] for i in b) <= limit for bins in found for b in bins)
    assert found == pack_ranks(lengths, limit, ranks)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(60, 200), RANKS)
def test_a_rank_idles_only_where_there_are_fewer_bins_than_ranks_to_fill(lengths, limit, ranks):
    found = pack_ranks(lengths, limit, ranks)
    assert all(all(bins) for bins in found[:-1])
    assert any(found[-1])
    loads = [[sum(lengths[i] for i in b) for b in bins] for bins in found]
    flat = list(itertools.chain(*loads))
    assert flat == sorted(flat, reverse=True)  # so that the ranks of one micro-batch are neighbours in load
    assert len(found) <= upstream(lengths, limit, ranks)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=3), max_size=30), RANKS, st.randoms())
def test_a_group_is_never_split(groups, ranks, random):
    pieces = [(length, number) for number, own in enumerate(groups) for length in own]
    random.shuffle(pieces)
    lengths, owners = [length for length, _ in pieces], [number for _, number in pieces]
    found = pack_ranks(lengths, 90, ranks, owners)
    assert sorted(i for bins in found for b in bins for i in b) == list(range(len(pieces)))
    homes = {}
    for place, b in enumerate(itertools.chain(*found)):
        assert sum(lengths[i] for i in b) <= 90
        for i in b:
            assert homes.setdefault(owners[i], place) == place


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), RANKS)
def test_without_packing_each_micro_batch_is_one_document_a_rank(lengths, ranks):
    found = Packing(max_tokens=60, on=False, ranks=ranks).spread(lengths)
    assert all(len(b) <= 1 for bins in found for b in bins)
    assert len(found) == -(-len(lengths) // ranks)
    assert sorted(i for bins in found for b in bins for i in b) == list(range(len(lengths)))


def test_the_ranks_of_other_runs_see_the_same_micro_batches_and_take_their_own():
    lengths = np.random.default_rng(0).integers(1, 900, 100).tolist()
    spreads = [Packing(max_tokens=1024, ranks=4, rank=rank).spread(lengths) for rank in range(4)]
    assert all(spread == spreads[0] for spread in spreads)
    own = [[i for bins in spread for i in bins[rank]] for rank, spread in enumerate(spreads)]
    assert sorted(itertools.chain(*own)) == list(range(100))


def upstream(lengths, limit, ranks):
    """Micro-batches of mini_trainer's packing: the longest prefix of the sorted lengths that fits, again and again."""

    def fits(part):
        heap = [0] * ranks
        for length in part:
            heapq.heapreplace(heap, heap[0] + length)
        return max(heap) <= limit

    left, count = sorted(lengths, reverse=True), 0
    while left:
        taken = max((n for n in range(1, len(left) + 1) if fits(left[:n])), default=1)
        left, count = left[taken:], count + 1
    return count


def uniform(random, count):
    return random.integers(16, 4096, count).tolist()


def bimodal(random, count):
    short, long = random.integers(50, 301, count), random.integers(3000, 8001, count)
    return np.where(random.random(count) < 0.8, short, long).tolist()


def log_normal(random, count):
    return np.clip(random.lognormal(6, 1, count), 1, 4000).astype(int).tolist()


TABLE = [  # how many fewer micro-batches than upstream, and how full, at least
    (uniform, 128, 8192, 1, 3, 0.97),
    (uniform, 256, 8192, 4, 2, 0.95),
    (bimodal, 128, 8192, 1, 3, 0.82),
    (bimodal, 256, 8192, 4, 2, 0.80),
    (log_normal, 512, 16384, 4, 0, 0.75),
]


@pytest.mark.parametrize(("draw", "count", "limit", "ranks", "fewer", "fill"), TABLE)
def test_there_are_fewer_and_fuller_micro_batches_than_upstream_makes(draw, count, limit, ranks, fewer, fill):
    lengths = draw(np.random.default_rng(0), count)
    found = pack_ranks(lengths, limit, ranks)
    assert len(found) <= upstream(lengths, limit, ranks) - fewer
    assert sum(lengths) / (len(found) * ranks * limit) >= fill
    assert 1.0 <= measure_imbalance(lengths, found) <= 1.028


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 5), st.integers(0, 30))
def test_the_order_of_a_step_does_not_depend_on_where_reading_began(size, batch, seed, first):
    order = Order(size=size, batch=batch, seed=seed)
    whole = [(samples, rows.tolist()) for samples, rows in itertools.islice(order.slices(), 40)]
    for (samples, rows), expected in zip(order.slices(order.samples_after(first)), whole[first:], strict=False):
        assert (samples, rows.tolist()) == expected


def test_an_epoch_reads_every_example_once_and_the_next_in_another_order():
    order = Order(size=25, batch=4, seed=3)
    steps = [rows.tolist() for _, rows in itertools.islice(order.slices(), 2 * order.steps_per_epoch)]
    first, second = steps[: order.steps_per_epoch], steps[order.steps_per_epoch :]
    assert sorted(i for s in first for i in s) == sorted(i for s in second for i in s) == list(range(25))
    assert first != second
    assert [len(s) for s in first] == [4] * 6 + [1]
    assert order_rows(25, 3, 0).tolist() != order_rows(25, 4, 0).tolist()


def test_how_evenly_ranks_are_loaded_is_among_the_numbers_of_a_run():
    import attrs
    from luthier.recipe import Recipe
    from luthier.recipe.objects import Objects
    from luthier.training.assemble import assemble_run

    rows = [{"input_ids": list(range(9, 9 + n))} for n in (40, 30, 20, 10)]
    recipe = Recipe.from_dict({"model": "demo", "data": "rows", "max_tokens_per_device": 40, "device": "cpu"})
    setup = assemble_run(recipe, Objects(data=rows)).setup
    portion = next(setup.feed.portions(0))
    assert setup.numbers_of(portion) == {"steps_per_epoch": 1}
    setup.packing = attrs.evolve(setup.packing, ranks=2)
    told = setup.numbers_of(portion)  # 40 beside 30, then 20 beside 10
    assert told == {"steps_per_epoch": 1, "rank_imbalance": pytest.approx((40 + 20) * 2 / 100)}
    assert setup.numbers_of(None) == {"steps_per_epoch": 1}
