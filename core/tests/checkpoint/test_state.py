"""State on disk: what goes in comes out, shared memory once, and nothing that would need unpickling."""

import json
from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from luthier.errors import LuthierError
from luthier.state_tree import (
    DTYPES,
    TENSORS,
    fill_tensors,
    load_state,
    optimizer_state,
    rebuild_tree,
    restore_optimizer,
    save_state,
    take_snapshot,
)

SOME = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint8, torch.bool]
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.builds(lambda n, d: (torch.arange(n) % 2).to(d), st.integers(0, 4), st.sampled_from(SOME))
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("a/_'", max_size=4) | st.integers(0, 9) | st.none(), inner, max_size=3)
    ),
    max_leaves=12,
)


def alike(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return type(one) is type(other) and one == other


@settings(deadline=None, max_examples=150, derandomize=True)
@given(tree=st.dictionaries(st.text(max_size=4), trees, max_size=4))
def test_a_tree_of_state_comes_back_as_it_was(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    save_state(tree, folder)
    assert alike(load_state(folder), tree)


def test_tensors_that_share_memory_are_written_once(tmp_path):
    weight = torch.randn(100, 100)
    save_state({"head": weight, "embedding": weight}, tmp_path)
    assert (tmp_path / TENSORS).stat().st_size < 1.2 * weight.numel() * 4
    held = load_state(tmp_path)
    assert torch.equal(held["head"], held["embedding"])


def test_no_two_tensors_are_written_under_one_path(tmp_path):
    tree = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "k": {1: torch.tensor(3), "1": torch.tensor(4)}}
    save_state(tree, tmp_path)
    assert alike(load_state(tmp_path), tree)


def test_tensors_that_a_mapping_makes_one_after_the_other_are_not_taken_for_one(tmp_path):
    class Made(Mapping):
        def __getitem__(self, key):
            return torch.full((10_000,), float(key))

        def __iter__(self):
            return iter(["1", "2", "3", "4"])

        def __len__(self):
            return 4

    save_state({"made": Made()}, tmp_path)
    assert [float(t[0]) for t in load_state(tmp_path)["made"].values()] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2)], ids=str)
def test_every_dtype_comes_back_with_every_bit(dtype, shape, tmp_path):
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (torch.Size(shape).numel() * size,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)
    save_state({"t": tensor}, tmp_path)
    held = load_state(tmp_path)["t"]
    assert (held.dtype, held.shape) == (tensor.dtype, tensor.shape)
    assert held.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_views_of_every_kind_come_back_as_what_they_show(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    views = {
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "expanded": base[:1].expand(5, 4),
        "flipped": base.flip(0),
        "conjugate": torch.conj(torch.tensor([1 + 2j])),
        "parameter": torch.nn.Parameter(base[1]),
        "scalar": base[2, 3],
    }
    save_state(views, tmp_path)
    held = load_state(tmp_path)
    assert all(torch.equal(held[name], view) for name, view in views.items())
    assert not held["parameter"].requires_grad


def test_what_comes_back_lies_in_memory_of_its_own_as_torch_aligns_it(tmp_path):
    save_state({"a": torch.ones(3), "b": torch.ones(100_000)}, tmp_path)
    held = load_state(tmp_path)
    assert str(tmp_path / TENSORS) not in Path("/proc/self/maps").read_text()
    assert held["b"].data_ptr() % 64 == torch.ones(100_000).data_ptr() % 64 == 0


def test_a_snapshot_stays_what_it_was_when_the_state_goes_on():
    weight = torch.zeros(1000)
    taken = take_snapshot({"w": weight, "losses": (losses := [1.0])})
    weight.add_(1)
    losses.append(2.0)
    assert rebuild_tree(taken.values, taken.tensors)["losses"] == [1.0]
    assert float(taken.tensors["w"].sum()) == 0


def test_a_snapshot_that_is_written_at_once_copies_only_what_must_be(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tree = {"whole": base, "part": base[1], "turned": torch.ones(2, 3).T, "again": base, "none": torch.empty(0)}
    taken = take_snapshot(tree, copy=False)
    lies = {t.data_ptr() for t in tree.values() if t.numel()}
    assert [name for name, t in taken.tensors.items() if t.data_ptr() in lies] == ["whole"]
    taken.write(tmp_path)
    assert alike(load_state(tmp_path), tree)


def test_memory_of_an_earlier_snapshot_is_used_again_only_where_it_fits():
    first = take_snapshot({"same": torch.zeros(1000), "grown": torch.zeros(10), "cast": torch.zeros(10)})
    tree = {"same": torch.ones(1000), "grown": torch.ones(20), "cast": torch.ones(10).bfloat16()}
    places = {name: t.data_ptr() for name, t in first.tensors.items()}
    second = take_snapshot(tree, first.tensors)
    assert alike(rebuild_tree(second.values, second.tensors), tree)
    assert [name for name, t in second.tensors.items() if t.data_ptr() == places[name]] == ["same"]


def test_infinities_survive_and_the_json_stays_json(tmp_path):
    save_state({"best": float("inf"), "worst": float("-inf")}, tmp_path)
    json.loads((tmp_path / "state.json").read_text(), parse_constant=pytest.fail)
    assert load_state(tmp_path) == {"best": float("inf"), "worst": float("-inf")}


UNWRITABLE = [
    *(object(), {1, 2}, b"bytes", lambda: 0, {(1, 2): 3}, {float("nan"): 1}),
    *(torch.zeros(2, dtype=torch.complex128), torch.zeros(2).to_sparse(), torch.zeros(2, device="meta")),
]


@pytest.mark.parametrize("value", UNWRITABLE, ids=lambda v: str(v).split("(")[0][:20])
def test_what_is_neither_tensor_nor_json_is_refused_by_its_path(value, tmp_path):
    with pytest.raises(LuthierError) as caught:
        save_state({"callbacks": {"mine": [1, value]}}, tmp_path)
    assert caught.value.code == "checkpoint-state"
    assert caught.value.where.startswith("callbacks/mine/1")


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    lambda p: torch.optim.Adagrad(p, lr=1e-2),
    lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
])  # fmt: skip
def test_an_optimizer_goes_on_bit_for_bit_with_the_dtypes_it_had(make, tmp_path):
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).bfloat16()

    def steps(net, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).bfloat16()
            net(inputs).square().sum().backward()
            optimizer.step()

    straight = model()
    steps(straight, make(straight.parameters()), range(6))
    first = model()
    optimizer = make(first.parameters())
    steps(first, optimizer, range(3))
    save_state({"optimizer": optimizer_state(optimizer)}, tmp_path)
    second = model()
    second.load_state_dict(first.state_dict())
    again = make(second.parameters())
    restore_optimizer(again, load_state(tmp_path)["optimizer"])
    for before, after in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert {k: getattr(v, "dtype", None) for k, v in before.items()} == {
            k: getattr(v, "dtype", None) for k, v in after.items()
        }
    steps(second, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


def test_an_optimizer_may_take_its_moments_and_keep_the_settings_it_has():
    parameter = torch.nn.Parameter(torch.ones(3))
    before, after = (torch.optim.AdamW([parameter], lr=0.1, weight_decay=decay) for decay in (0.1, 0.5))
    parameter.sum().backward()
    before.step()
    restore_optimizer(after, optimizer_state(before), settings=False)
    assert after.param_groups[0]["weight_decay"] == 0.5
    assert torch.equal(after.state[parameter]["exp_avg"], before.state[parameter]["exp_avg"])


def test_nested_state_goes_to_its_parameters_device_and_what_was_on_the_host_stays_there():
    elsewhere = torch.nn.Parameter(torch.ones(2, device="meta"))
    optimizer = torch.optim.SGD([elsewhere], lr=0.1)
    entries = {
        "step": torch.tensor(3.0),
        "blocks": [{"left": torch.ones(2)}],
        "count": 4,
        "fused_step": torch.tensor(1.0),
    }
    held = {"state": {"0": entries}, "host": {"0": ["step"]}, "groups": [{"lr": 0.1}]}
    restore_optimizer(optimizer, held)
    state = optimizer.state[elsewhere]
    assert (state["step"].device.type, state["count"]) == ("cpu", 4)
    assert state["blocks"][0]["left"].device.type == state["fused_step"].device.type == "meta"
    assert optimizer_state(optimizer)["host"] == {"0": ["step"]}


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    one = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    other = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.ones(2))]}, {"params": [torch.nn.Parameter(torch.ones(1))]}]
    )
    with pytest.raises(LuthierError) as caught:
        restore_optimizer(other, optimizer_state(one))
    assert caught.value.code == "checkpoint-corrupt"


def test_tensors_that_do_not_fit_are_refused_and_change_nothing():
    own = {"a": torch.zeros(2), "b": torch.zeros(3)}
    fitting = {"a": torch.ones(2), "b": torch.ones(3)}
    for wrong, problem in (
        ({"a": torch.ones(2)}, "lacks"),
        ({**fitting, "c": torch.ones(1)}, "unknown"),
        ({**fitting, "b": torch.ones(4)}, "shape"),
    ):
        with pytest.raises(LuthierError, match=problem) as refused:
            fill_tensors(own, wrong, "adapter state", "checkpoint-corrupt")
        assert (refused.value.code, refused.value.where) == ("checkpoint-corrupt", "adapter state")
        assert not own["a"].any()
    fill_tensors(own, fitting, "adapter state", "checkpoint-corrupt")
    assert own["a"].all() and own["b"].all()
