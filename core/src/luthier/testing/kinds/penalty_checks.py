"""Checks of penalties: finite sums in float32 over the groups' weights, that fall along their gradients.

Those of penalties of the tokens are in `token_penalty_checks`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from hypothesis import strategies as st

from luthier.plugins.completion import has_default
from luthier.plugins.contracts.values import Group, Role
from luthier.plugins.records import Record
from luthier.testing.laws import Subject, law, not_run
from luthier.testing.penalties import token_penalty_checks

if TYPE_CHECKING:
    from torch import Tensor

SHAPES: Final[dict[Role, tuple[int, ...]]] = {"hidden": (6, 5), "embedding": (7, 6), "norm": (6,), "bias": (5,)}
SEEDS: Final = st.integers(0, 99)
SCALES: Final = st.sampled_from((1.0, 0.0, 1e-3, 1e3))
STEP: Final = 1e-4  # relative to the weights, where a value is asked whether it falls


def _of_weights(record: Record) -> bool:
    return getattr(record, "over", "weights") == "weights"


token_costs_add_up = token_penalty_checks.token_costs_add_up
gives_each_token_a_cost = token_penalty_checks.gives_each_token_a_cost
token_gradients_are_finite = token_penalty_checks.token_gradients_are_finite
token_costs_do_not_leak = token_penalty_checks.token_costs_do_not_leak
token_costs_ignore_order = token_penalty_checks.token_costs_ignore_order
token_costs_of_idle_batches = token_penalty_checks.token_costs_of_idle_batches
declares_the_policies_it_asks = token_penalty_checks.declares_the_policies_it_asks


@law(12, when=_of_weights, seed=SEEDS, scale=SCALES)
def gives_a_finite_scalar(subject: Subject, options: Any, seed: int, scale: float) -> None:
    """The value is one finite number, weights of 0 and large ones included, or None."""
    groups = _groups(seed, scale)
    value = _begun(subject, options, groups).measure(groups)
    if value is not None:
        assert value.dim() == 0, f"one number, not a tensor of shape {list(value.shape)}"
        assert value.isfinite(), f"{float(value.detach())} for weights of scale {scale:g}"


@law(12, when=_of_weights, seed=SEEDS, scale=SCALES)
def gives_finite_gradients(subject: Subject, options: Any, seed: int, scale: float) -> None:
    """No weight gets NaN or infinity as its gradient, weights of 0 and large ones included."""
    groups = _groups(seed, scale)
    value = _begun(subject, options, groups).measure(groups)
    if value is None:
        return
    assert value.requires_grad, "the value has no path to the weights"
    value.backward()
    for parameter in _parameters(groups):
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), f"a gradient is not finite for weights of scale {scale:g}"


@law(12, when=_of_weights, seed=SEEDS)
def falls_along_its_gradient(subject: Subject, options: Any, seed: int) -> None:
    """A small step of the weights against their gradients makes the value smaller."""
    import torch

    groups = _groups(seed, 1.0, torch.float64)
    part = _begun(subject, options, groups)
    before = part.measure(groups)
    if before is None:
        not_run("it counts none of the kit's weights")
    before.backward()
    before = float(before.detach())
    with torch.no_grad():
        slope = math.sqrt(sum(float(p.grad.square().sum()) for p in _parameters(groups) if p.grad is not None))
        size = math.sqrt(sum(float(p.square().sum()) for p in _parameters(groups)))
        rate = STEP * size / slope if slope else 0.0
        if rate * slope**2 <= 1e-9 * abs(before):
            return  # it is at rest
        for parameter in _parameters(groups):
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=rate)
        after = float(part.measure(groups))
    assert after < before, f"{before:.9g} becomes {after:.9g}"


@law(12, when=_of_weights, seed=SEEDS)
def adds_up_over_groups(subject: Subject, options: Any, seed: int) -> None:
    """The value of all groups is the sum of each group's own: a mean would depend on how the weights are grouped."""
    groups = _groups(seed, 1.0)
    whole = _number(_begun(subject, options, groups).measure(groups))
    parts = [_number(_begun(subject, options, [group]).measure([group])) for group in groups]
    close = math.isclose(whole, sum(parts), rel_tol=1e-4, abs_tol=1e-6)
    assert close, f"{whole:.6g} for all groups together, {sum(parts):.6g} for one after the other"


@law(8, when=_of_weights, seed=SEEDS)
def counts_in_float32(subject: Subject, options: Any, seed: int) -> None:
    """Weights in bfloat16 give the value that the same weights in float32 give, and that in float32 or better."""
    import torch

    low = _groups(seed, 1.0, torch.bfloat16)
    high = _copied(low, torch.float32)
    value, expected = (_begun(subject, options, groups).measure(groups) for groups in (low, high))
    if value is None:
        not_run("it counts none of the kit's weights")
    assert value.dtype.itemsize >= 4, f"the value is in {value.dtype}"
    close = math.isclose(_number(value), _number(expected), rel_tol=1e-4, abs_tol=1e-6)
    assert close, f"{_number(value):.6g} of bfloat16 weights, {_number(expected):.6g} of the same in float32"


@law(8, when=_of_weights, seed=SEEDS)
def leaves_the_weights_alone(subject: Subject, options: Any, seed: int) -> None:
    """Measuring changes no weight, and a second time it gives the same number."""
    import torch

    groups = _groups(seed, 1.0)
    part = _begun(subject, options, groups)
    before = [parameter.detach().clone() for parameter in _parameters(groups)]
    first, second = _number(part.measure(groups)), _number(part.measure(groups))
    same = all(torch.equal(old, new) for old, new in zip(before, _parameters(groups), strict=True))
    assert same, "measuring changes a weight"
    assert first == second, f"{first:.9g} the first time, {second:.9g} the second"


@law(8, when=_of_weights, seed=SEEDS)
def begins_again(subject: Subject, options: Any, seed: int) -> None:
    """With a second `begin`, as of the next task, only its weights count."""
    groups, part = _groups(seed, 1.0), subject.build(options)
    if has_default(part, "penalty", "begin"):
        not_run("it does not ask for the weights at the start")
    part.begin(_started(groups))
    part.begin(_copied(groups))
    fresh = subject.build(options)
    fresh.begin(_copied(groups))
    again, once = _number(part.measure(groups)), _number(fresh.measure(groups))
    assert again == once, f"{again:.9g} after a second begin, {once:.9g} after this one alone"


@law(2, when=_of_weights)
def takes_no_groups(subject: Subject, options: Any) -> None:
    """Without any weights the value is None or 0."""
    assert _number(_begun(subject, options, []).measure([])) == 0.0, "no weights, and yet a value"


def live(subject: Subject, options: Any) -> None:
    """A life of the part: one value and its gradients."""
    if not _of_weights(subject.record):
        token_penalty_checks.live_on_tokens(subject, options)
        return
    groups = _groups(0, 1.0)
    value = _begun(subject, options, groups).measure(groups)
    if value is not None:
        value.backward()


def _begun(subject: Subject, options: Any, groups: Sequence[Group]) -> Any:
    """Return the part, which was told that the weights began elsewhere."""
    part = subject.build(options)
    if not has_default(part, "penalty", "begin"):
        part.begin(_started(groups))
    return part


def _started(groups: Sequence[Group]) -> list[Group]:
    """Return copies of the groups with other numbers, of the same scale."""
    started = _copied(groups)
    for parameter in _parameters(started):
        parameter.requires_grad_(False).mul_(-0.5)
    return started


def _groups(seed: int, scale: float, dtype: Any = None) -> list[Group]:
    """A group of each role, of two tensors each."""
    import torch

    random = torch.Generator().manual_seed(seed)
    groups = []
    for role, shape in SHAPES.items():
        drawn = [torch.randn(shape, generator=random) * scale for _ in range(2)]
        parameters = [torch.nn.Parameter(weight.to(dtype or torch.float32)) for weight in drawn]
        names = [f"layers.{number}.{role}.weight" for number in range(2)]
        groups.append(Group(parameters=parameters, names=names, role=role))
    return groups


def _copied(groups: Sequence[Group], dtype: Any = None) -> list[Group]:
    import torch

    return [
        Group(
            parameters=[torch.nn.Parameter(p.detach().to(dtype or p.dtype, copy=True)) for p in group.parameters],
            names=group.names,
            role=group.role,
        )
        for group in groups
    ]


def _parameters(groups: Sequence[Group]) -> list[Any]:
    return [parameter for group in groups for parameter in group.parameters]


def _number(value: Tensor | None) -> float:
    return 0.0 if value is None else float(value.detach())
