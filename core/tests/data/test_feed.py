"""Prefetch: the same portions and micro-batches, made ahead by one thread that ends with the run."""

import itertools
import threading

import numpy as np
import pytest
import torch
from luthier.data.batches.example_feed import RowFeed
from luthier.data.batches.micro_batches import rank_batches
from luthier.data.batches.packing import Packing
from luthier.data.batches.prefetch import prefetch_pays, prefetch_portions
from luthier.data.batches.row_order import Order
from luthier.data.examples import TokenDataset, TokenExample

CPU = torch.device("cpu")
PACKING = Packing(max_tokens=64)


def dataset(count=40, seed=0):
    random = np.random.default_rng(seed)
    rows = [random.integers(0, 300, n).astype(np.int32) for n in random.integers(2, 30, count)]
    return TokenDataset.of([TokenExample(input_ids=row, labels=row, where=f"rows:{i}") for i, row in enumerate(rows)])


def feed(total=20, **changes):
    return RowFeed(dataset=dataset(**changes), order=Order(size=40, batch=8, seed=3), max_steps=total)


def make(portion):
    return PACKING, list(rank_batches(portion.examples, PACKING, CPU))


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "luthier-feed"]


def test_portions_made_ahead_are_those_made_in_their_turn():
    plain = [(p.step, p.ended, p.ends_epoch, p.last, make(p)[1]) for p in feed().portions(3)]
    made = [
        (p.step, p.ended, p.ends_epoch, p.last, p.ready[1]) for p in prefetch_portions(feed().portions(3), make, CPU)
    ]
    assert [one[:4] for one in plain] == [other[:4] for other in made]
    for (*_, one), (*_, other) in zip(plain, made, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.labels, b.labels)
            assert a.where == b.where
    assert not threads()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_steps_are_made_ahead_than_its_depth(depth):
    begun, allowed = [], threading.Semaphore(0)

    def counted(portion):
        begun.append(portion.step)
        allowed.release()
        return make(portion)

    portions = prefetch_portions(feed().portions(0), counted, CPU, depth)
    first = next(portions)
    for _ in range(depth + 2):  # one in hand, `depth` waiting, one that waits for room
        allowed.acquire()
    assert first.step == 0
    assert len(begun) <= depth + 2
    portions.close()
    assert not threads()


def test_what_the_thread_raises_is_raised_where_its_portion_would_come():
    def broken(portion):
        if portion.step == 4:
            raise ValueError("row 32")
        return make(portion)

    seen = []
    with pytest.raises(ValueError, match="row 32") as caught:
        for portion in prefetch_portions(feed().portions(0), broken, CPU):
            seen.append(portion.step)
    assert seen == [0, 1, 2, 3]
    assert any(entry.name == "broken" for entry in caught.traceback)
    assert not threads()


def test_an_error_of_the_rows_themselves_is_raised_too():
    def portions():
        yield from itertools.islice(feed().portions(0), 2)
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        list(prefetch_portions(portions(), make, CPU))


def test_the_thread_ends_with_the_loop_that_leaves_early():
    portions = prefetch_portions(feed(total=None).portions(0), make, CPU)
    for portion in portions:
        if portion.step == 3:
            break
    portions.close()
    assert not threads()


def test_nobodys_random_numbers_move():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(prefetch_portions(feed().portions(0), make, CPU))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_a_thread_reads_ahead_where_it_does_not_take_the_place_of_computing():
    assert prefetch_pays(torch.device("cuda"), streaming=False)[0]
    assert not prefetch_pays(CPU, streaming=False)[0]
    found, why = prefetch_pays(CPU, streaming=True)  # tests compute with one thread
    import os

    assert found == (len(os.sched_getaffinity(0)) > 1), why


def test_a_stream_that_is_read_ahead_gives_and_remembers_what_one_that_is_not_does(tmp_path):
    from luthier.data.prepare import prepare_data
    from luthier.data.stream.stream_feed import StreamFeed
    from luthier.recipe.schema import Data, Source
    from luthier.testing.worlds import tiny_tokenizer

    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {i} {'x' * (i % 9)}\n" for i in range(50)))
    data = Data(train=[Source(path=str(path))], text_unit="line", streaming=True, shuffle_buffer=7)

    def stream():
        made = prepare_data(data, tiny_tokenizer(), seed=0).train
        return StreamFeed(stream=made, batch=6, seed=1, buffer=7, total=12)

    one, other = stream(), stream()
    plain, early = list(one.portions(0)), list(prefetch_portions(other.portions(0), make, CPU))
    assert len(plain) == len(early) == 12
    for a, b in zip(plain, early, strict=True):
        assert [e.where for e in a.examples] == [e.where for e in b.examples]
        first, second = one.state(a), other.state(b)
        assert first.keys() == second.keys()
        assert first["turns"] == second["turns"]
        assert torch.equal(first["buffer"]["input_ids"], second["buffer"]["input_ids"])


def test_a_batch_on_its_own_is_made_again_where_the_limit_was_lowered(train, tmp_path):
    """What was packed ahead under the old limit is not used under the new one."""
    from luthier.recipe import Recipe
    from luthier.recipe.objects import Objects
    from luthier.training.assemble import assemble_run

    run = train(max_steps=1)
    recipe = Recipe.load(run.output_path / "recipe.yaml", environ={})
    setup = assemble_run(recipe, Objects(data=[{"text": "ab " * n} for n in range(2, 12)])).setup
    portion = next(
        prefetch_portions(setup.feed.portions(0), lambda p: (setup.packing, list(setup.micro_batches(p))), CPU)
    )
    kept = list(setup.micro_batches(portion))
    assert kept[0] is portion.ready[1][0]
    setup.packing = Packing(max_tokens=40)
    again = list(setup.micro_batches(portion))
    assert len(again) > len(kept)
    assert sum(b.num_tokens for b in again) == sum(b.num_tokens for b in kept)
