"""State on disk: what goes in comes out, shared memory once, and nothing that would need unpickling."""

import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from luthier.engine.state import TENSORS, load_state, optimizer_state, restore_optimizer, save_state
from luthier.errors import LuthierError

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint8, torch.bool]
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.builds(lambda n, d: (torch.arange(n) % 2).to(d), st.integers(0, 4), st.sampled_from(DTYPES))
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=3)
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


def test_infinities_survive_and_the_json_stays_json(tmp_path):
    save_state({"best": float("inf"), "worst": float("-inf")}, tmp_path)
    json.loads((tmp_path / "state.json").read_text(), parse_constant=pytest.fail)
    assert load_state(tmp_path) == {"best": float("inf"), "worst": float("-inf")}


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", lambda: 0])
def test_what_is_neither_tensor_nor_json_is_refused_by_its_path(value, tmp_path):
    with pytest.raises(LuthierError) as caught:
        save_state({"callbacks": {"mine": [1, value]}}, tmp_path)
    assert caught.value.code == "checkpoint-state"
    assert caught.value.where == "callbacks/mine/1"


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


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    one = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    other = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.ones(2))]}, {"params": [torch.nn.Parameter(torch.ones(1))]}]
    )
    with pytest.raises(LuthierError) as caught:
        restore_optimizer(other, optimizer_state(one))
    assert caught.value.code == "checkpoint-corrupt"
