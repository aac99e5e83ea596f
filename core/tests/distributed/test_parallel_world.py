"""The world: what ranks tell each other, and who they are."""

import math
import os
import select
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.distributed.broadcast import broadcast_tree
from luthier.distributed.join import backend_for, device_name, join_world
from luthier.distributed.store import claim_first
from luthier.distributed.turns import first_here
from luthier.distributed.world import World, add_numbers
from luthier.errors import LuthierError
from luthier.recipe.schema import Distributed
from luthier.testing import expect_error
from luthier.testing.ranks import in_ranks

NUMBERS = st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False, width=64), max_size=3)


def everything():
    world = World.current()
    own = {"shared": 0.1 * (world.rank + 1), f"own {world.rank}": 1e300, "odd": math.inf if world.rank else 1.0}
    found = {
        "who": [world.rank, world.size, world.local_rank, world.local_size, world.backend, world.is_main],
        "sum": world.sum_numbers(own),
        "gathered": world.gather([world.rank, "é" * (1 + 3 * world.rank), None]),
        "broadcast": world.broadcast({"from": world.rank}),
        "any": [world.any(world.rank == 2), world.any(False)],
        "decided": world.decide(lambda: {"by": world.rank}),
    }
    world.barrier()

    def refuse():
        raise LuthierError("data-row", "is broken", where="rows.jsonl:3", found={"a": 1})

    with pytest.raises(LuthierError) as caught:
        world.decide(refuse)
    return {**found, "error": caught.value.to_dict()}


def test_every_rank_hears_the_same_to_the_last_bit():
    answers = in_ranks(3, everything)
    assert [a["who"] for a in answers] == [[r, 3, r, 3, "gloo", r == 0] for r in range(3)]
    for answer in answers:
        shared = {k: v for k, v in answer.items() if k != "who"}
        assert shared == {k: v for k, v in answers[0].items() if k != "who"}
        assert answer["sum"] == {
            "shared": 0.1 + 0.2 + 0.1 * 3,
            "odd": math.inf,
            **{f"own {r}": 1e300 for r in range(3)},
        }
        assert answer["gathered"] == [[r, "é" * (1 + 3 * r), None] for r in range(3)]
        assert answer["broadcast"] == {"from": 0}
        assert answer["any"] == [True, False]
        assert answer["decided"] == {"by": 0}
        assert answer["error"]["code"] == "data-row"
        assert "rows.jsonl:3: is broken" in answer["error"]["message"]


def test_a_process_alone_is_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = World.current()
    assert (world.rank, world.size, world.is_main, world.backend) == (0, 1, True, "none")
    assert world.sum_numbers({"a": 1.5}) == {"a": 1.5}
    assert world.broadcast([1]) == [1]
    assert not world.any(False)
    assert join_world(Distributed()) == world


def test_the_environment_of_a_launcher_tells_who_one_is(monkeypatch):
    told = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "TORCHELASTIC_RESTART_COUNT": 2}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    assert World.current() == World(rank=5, size=8, local_rank=1, local_size=4, restarts=2)


def test_an_environment_that_is_not_whole_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with expect_error("distributed-setup", "environment", "MASTER_ADDR", "MASTER_PORT") as caught:
        join_world(Distributed())
    assert caught.value.code == "distributed-setup"


@settings(deadline=None, max_examples=30)
@given(st.lists(NUMBERS, min_size=1, max_size=4))
def test_numbers_are_added_by_name_whoever_has_them(parts):
    total = add_numbers(parts)
    assert total.keys() == {name for part in parts for name in part}
    for name, value in total.items():
        expected = sum(part[name] for part in parts if name in part)
        assert value == expected or math.isnan(value) and math.isnan(expected)


def test_a_backend_is_honoured_or_refused():
    assert backend_for("auto", "cpu") == backend_for("gloo", "cpu") == "gloo"
    with expect_error("distributed-setup", "distributed.backend") as caught:
        backend_for("nccl", "cpu")
    assert (caught.value.code, caught.value.where) == ("distributed-setup", "distributed.backend")
    if not torch.distributed.is_mpi_available():
        with expect_error("distributed-setup", "distributed.backend"):
            backend_for("mpi", "cpu")


def test_each_rank_has_a_device_of_its_own():
    second = World(rank=5, size=8, local_rank=1, local_size=4)
    assert device_name("cuda", second) == "cuda:1"
    assert device_name("cpu", second) == "cpu"
    assert device_name("cuda:3", World()) == "cuda:3"
    for single in ("cuda:0", "mps"):
        with expect_error("recipe-conflict", "device", "8"):
            device_name(single, second)


def test_a_rank_that_falls_silent_counts_as_lost_after_the_timeout():
    ends = os.pipe()

    def work():
        world = join_world(Distributed(timeout=1.0), "cpu")
        assert (world.size, world.backend) == (2, "gloo")
        if world.is_main:
            with pytest.raises(LuthierError) as caught:
                world.barrier()
            os.write(ends[1], b"over")
            return [caught.value.code, caught.value.exit_status]
        return [os.read(ends[0], 4).decode()]

    assert in_ranks(2, work, joined=False) == [["distributed-lost", 1], ["over"]]


def test_what_one_rank_decides_may_take_longer_than_the_timeout():
    def work():
        world = join_world(Distributed(timeout=1.0), "cpu")
        return world.decide(lambda: select.select([], [], [], 1.5) and "at last")

    assert in_ranks(2, work, joined=False) == ["at last"] * 2


def test_one_rank_of_a_machine_goes_first_also_where_it_fails(tmp_path):
    def work():
        world = World.current()
        with first_here(world):
            first = not (tmp_path / "made").exists()
            (tmp_path / "made").touch()
        with pytest.raises(ZeroDivisionError), first_here(world):
            raise ZeroDivisionError
        return first

    assert in_ranks(3, work) == [True, False, False]


def test_what_one_rank_prepares_alone_takes_no_turn_that_the_others_would_wait_for():
    def work():
        def prepare_alone():
            with first_here(World()):
                return "prepared"

        world = World.current()
        return [world.decide(prepare_alone), world.decide(lambda: "next")]

    assert in_ranks(2, work) == [["prepared", "next"]] * 2


def test_what_every_rank_would_say_is_said_once():
    assert sorted(in_ranks(3, lambda: claim_first("the same"))) == [False, False, True]
    assert claim_first("alone")


def test_a_tree_that_rank_0_has_read_is_everyones_to_the_bit():
    held = {
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "none": [None, {"flag": torch.tensor([True, False])}, torch.empty(0, 2)],
    }

    def read():
        return broadcast_tree(World.current(), lambda: held if World.current().is_main else {}[0])

    for tree in in_ranks(2, read):
        assert tree["half"].dtype is torch.bfloat16
        assert torch.equal(tree["half"].view(torch.int16), held["half"].view(torch.int16))
        assert tree["count"] == held["count"]
        assert tree["none"][0] is None
        assert torch.equal(tree["none"][1]["flag"], held["none"][1]["flag"])
        assert tree["none"][2].shape == (0, 2)


def test_decisions_within_a_decision_are_rank_0s_alone():
    def work():
        world = World.current()
        return world.decide(lambda: [world.decide(lambda: world.rank), world.broadcast(1) if world.size == 1 else 2])

    assert in_ranks(2, work) == [[0, 2]] * 2


def test_another_thread_talks_in_a_group_of_its_own():
    def work():
        world = World.current()
        aside, heard = world.aside(), []
        thread = threading.Thread(target=lambda: heard.extend(aside.gather(world.rank * 10) for _ in range(20)))
        thread.start()
        told = [world.gather(world.rank) for _ in range(20)]
        thread.join()
        return [told == [[0, 1]] * 20, heard == [[0, 10]] * 20]

    assert in_ranks(2, work) == [[True, True]] * 2
