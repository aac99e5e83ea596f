"""What stays, stays: the protected triplets of a weight, whatever the optimizer does to what trains."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_osft.complement import Complement, complement_shapes
from luthier_osft.decompose import decompose
from luthier_osft.factored import FactoredLayer
from luthier_osft.layers import OsftLayer, Switch
from luthier_osft.ranks import fixed_rank, preserved_rank, scheduled_rank
from torch import nn
from transformers.pytorch_utils import Conv1D

STEPS = 200
SHAPES = [(40, 40), (48, 24), (24, 48)]
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9),
}


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def wrapped(weight, rank, kind=OsftLayer):
    """A linear layer with this weight, decomposed."""
    base = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype).requires_grad_(False)
    base.weight.data.copy_(weight)
    layer = kind(base, rank, Switch(), torch.device("cpu"))
    layer.begin(decompose(weight, rank, tails=kind is FactoredLayer), rank)
    return layer


def trained(layer, optimizer, steps=STEPS, afterwards=True):
    """Fit random targets, with what the adapter does around a step; `afterwards` False leaves out what follows one."""
    parameters = list(layer.trained().values())
    optimizer = optimizer(parameters)
    x, y = drawn(128, layer.in_features, seed=1), drawn(128, layer.out_features, seed=2)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().mul(10).backward()
        if isinstance(layer, FactoredLayer):
            layer.project(layer.left.grad, layer.right.grad)
        optimizer.step()
        if afterwards and isinstance(layer, FactoredLayer):
            layer.project(layer.left.detach(), layer.right.detach())
    return layer


def trained_change(layer):
    """[out, in]: the change with which the layer trains, in which factors are not projected once more."""
    with torch.no_grad():
        return layer.train().change(torch.eye(layer.in_features)).T


def leak(weight, change, rank):
    """The largest share of a change that lies in the first left or right singular directions."""
    u, _, v = torch.linalg.svd(weight.double())
    size = change.double().norm()
    return max(
        float((u[:, :rank].T @ change.double()).norm() / size), float((change.double() @ v[:rank].T).norm() / size)
    )


@pytest.mark.parametrize("kind", [OsftLayer, FactoredLayer])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_moves_what_is_protected(kind, optimizer):
    for shape in SHAPES if kind is OsftLayer else SHAPES[1:2]:
        weight = drawn(*shape) / 5
        rank = fixed_rank(min(shape), 0.25)
        steps = STEPS if optimizer == "adamw" else STEPS // 4
        change = trained_change(trained(wrapped(weight, rank, kind), OPTIMIZERS[optimizer], steps))
        assert change.norm() > 0.1 and leak(weight, change, rank) < 1e-6


def test_without_the_projection_after_the_step_factors_leave_their_subspace():
    weight = drawn(40, 40) / 5
    layer = wrapped(weight, 30, FactoredLayer)
    assert leak(weight, trained_change(trained(layer, OPTIMIZERS["adamw"], 20, afterwards=False)), 30) > 1e-2


def test_outside_of_training_and_merged_the_change_of_any_factors_is_within_the_subspace():
    """So an optimizer's average of weights, which has steps from before their projection, keeps the guarantee."""
    weight = drawn(40, 24) / 5
    layer = trained(wrapped(weight, 18, FactoredLayer), OPTIMIZERS["adamw"], 5, afterwards=False).eval()
    change = layer.change_weight()
    assert leak(weight, change, 18) < 1e-6 and change.norm() > 0.01
    assert torch.allclose(layer.change(torch.eye(24)).detach().T, change, atol=1e-5)


@pytest.mark.parametrize("kind", [OsftLayer, FactoredLayer])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_singular_triplets_of_the_new_weight_within_the_protected_subspace_are_the_old_ones(kind, shape):
    weight = drawn(*shape) / 5
    rank = min(shape) // 2
    after = (weight + trained(wrapped(weight, rank, kind), OPTIMIZERS["adamw"]).change_weight()).double()
    u, s, v = torch.linalg.svd(weight.double())
    within = u[:, :rank].T @ after @ v[:rank].T
    assert torch.allclose(within, s[:rank].diag(), atol=1e-5)
    assert torch.allclose(after @ v[:rank].T, u[:, :rank] * s[:rank], atol=1e-5)
    assert torch.allclose(u[:, :rank].T @ after, s[:rank, None] * v[:rank], atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_factors_are_projected_in_the_dtype_of_the_products_they_come_from(shape):
    weight, found = drawn(*shape) / 5, {}
    layer = wrapped(weight, 18, FactoredLayer)
    for low in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            layer(drawn(128, shape[1])).float().square().sum().backward()
        layer.project_gradients()
        found[low] = layer.left.grad @ layer.right.grad
        assert layer.left.grad.dtype is torch.float32 and leak(weight, found[low], 18) < (1e-2 if low else 1e-6)
    assert (found[True] - found[False]).norm() < 0.05 * found[False].norm()


def test_decay_alone_moves_nothing_that_is_protected():
    weight = drawn(32, 24)
    layer = wrapped(weight, 18, FactoredLayer)
    with torch.no_grad():
        for parameter in layer.trained().values():
            parameter.mul_(0.3)
    assert leak(weight, trained_change(layer), 18) < 1e-6


sizes = st.tuples(st.integers(2, 14), st.integers(2, 14), st.integers(0, 1000))


@settings(max_examples=40, deadline=None)
@given(sizes, st.floats(0.01, 0.99), st.sampled_from(["full", "low rank", "equal", "axes"]))
def test_both_complements_are_orthonormal_and_belong_to_one_decomposition(drawn_sizes, share, kind):
    rows, columns, seed = drawn_sizes
    weight = drawn(rows, columns, seed=seed, dtype=torch.float64)
    if kind == "low rank":
        weight = weight[:, :1] @ weight[:1]
    elif kind == "equal":
        weight = torch.linalg.qr(weight).Q if rows >= columns else torch.linalg.qr(weight.T).Q.T
    elif kind == "axes":
        weight = torch.zeros_like(weight).fill_diagonal_(2.0)
    rank = preserved_rank(min(rows, columns), share)
    found = decompose(weight, rank)
    bases = []
    for side, size in (("out", rows), ("in", columns)):
        tensors = {n.partition(".")[2]: t for n, t in found.items() if n.startswith(side)}
        assert {n: tuple(t.shape) for n, t in tensors.items()} == complement_shapes(size, rank)
        held = Complement(size, tensors)
        basis = held.expand(torch.eye(size - rank, dtype=torch.float64)).T
        assert torch.allclose(basis.T @ basis, torch.eye(size - rank, dtype=torch.float64), atol=1e-10)
        x = drawn(3, size, dtype=torch.float64)
        assert torch.allclose(held.project(x), x @ basis, atol=1e-10)
        assert torch.allclose(held.keep(x), x @ basis @ basis.T, atol=1e-10)
        bases.append(basis)
    outer, inner = bases
    kept_out, kept_in = (torch.eye(len(b), dtype=torch.float64) - b @ b.T for b in bases)
    assert torch.allclose(kept_out @ weight @ (inner @ inner.T), torch.zeros_like(weight), atol=1e-7)
    assert torch.allclose((outer @ outer.T) @ weight @ kept_in, torch.zeros_like(weight), atol=1e-7)
    best = torch.linalg.svdvals(weight)[:rank].square().sum()
    assert torch.allclose((kept_out @ weight @ kept_in).square().sum(), best, rtol=1e-7, atol=1e-9)


def test_a_complement_projects_onto_the_tensors_that_were_last_copied_into_it():
    layer = wrapped(drawn(24, 12), 6)
    x = drawn(3, 24)
    for seed in (1, 2):
        weight = drawn(24, 12, seed=seed)
        layer.begin(decompose(weight, 6), 6)
        kept = torch.linalg.svd(weight).U[:, :6]
        assert torch.allclose(layer.out_side.keep(x), x - x @ kept @ kept.T, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "ratio", "rank"), [(10, 0.9, 1), (10, 0.1, 9), (64, 0.25, 48), (48, 1.0, 0), (7, 1e-9, 6)]
)
def test_the_rank_is_the_floor_of_the_share_as_it_was_written(size, ratio, rank):
    assert fixed_rank(size, ratio) == rank


def test_task_i_of_n_preserves_i_minus_one_nths():
    assert [scheduled_rank(32, index, 5) for index in range(5)] == [0, 6, 12, 19, 25]


@pytest.mark.parametrize(
    ("shape", "ratio", "count"),
    [((64, 64), 0.25, 256), ((64, 64), 0.5, 1024), ((96, 48), 0.25, 720), ((48, 96), 0.5, 1728)],
)
def test_as_many_numbers_train_as_the_reachable_weights_have_freedoms(shape, ratio, count):
    assert wrapped(drawn(*shape), fixed_rank(min(shape), ratio)).core.numel() == count


@pytest.mark.parametrize("kind", [OsftLayer, FactoredLayer])
@pytest.mark.parametrize("shape", [(32, 32), (48, 20), (20, 48)])
def test_both_forms_reach_the_constrained_optimum_in_closed_form(kind, shape):
    weight, rank = drawn(*shape, dtype=torch.float64) / 5, min(shape) // 2
    layer = wrapped(weight, rank, kind)
    x = drawn(400, shape[1], seed=1, dtype=torch.float64)
    y = x @ drawn(*shape, seed=2, dtype=torch.float64).T
    u, _, v = torch.linalg.svd(weight)
    outer, inner = u[:, rank:], v[rank:].T
    residual = (y - x @ weight.T - layer.base_layer.bias) @ outer
    solution = torch.linalg.lstsq(x @ inner, residual).solution.T
    best = (x @ (weight + outer @ solution @ inner.T).T + layer.base_layer.bias - y).square().mean()
    optimizer = torch.optim.LBFGS(list(layer.trained().values()), max_iter=600, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        if kind is FactoredLayer:
            layer.project(layer.left.grad, layer.right.grad)
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert float(closure().detach()) == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("kind", [OsftLayer, FactoredLayer])
def test_a_conv1d_layer_is_decomposed_as_the_linear_layer_with_its_weight(kind):
    base = Conv1D(20, 12).requires_grad_(False)
    layer = kind(base, 6, Switch(), torch.device("cpu"))
    layer.begin(decompose(base.weight.T, 6, tails=kind is FactoredLayer), 6)
    x = drawn(5, 12)
    assert torch.equal(layer(x), base(x))
    trained(layer, OPTIMIZERS["adamw"], 5)
    merged = x @ (base.weight + layer.change_weight().T) + base.bias
    assert torch.allclose(layer(x), merged, atol=1e-5)
    assert leak(base.weight.T, layer.change_weight(), 6) < 1e-6
