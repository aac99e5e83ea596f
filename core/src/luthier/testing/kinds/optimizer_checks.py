"""Checks of optimizers: they resume exactly, skip parameters without gradient, respect groups, lower a quadratic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
from hypothesis import strategies as st

from luthier.plugins.completion import has_default
from luthier.plugins.contracts.values import Group
from luthier.testing.laws import Subject, law, not_run
from luthier.testing.strategies import drawn_seeds

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

RATE: Final = 0.01
RATES: Final = (1.0, 0.1, 0.01, 0.001)  # at least one of them must suit the optimizer
ESTIMATES: Final = 8  # seeds whose estimates are compared with the gradient
DTYPES: Final = ("float32", "bfloat16", "float64")


@attrs.frozen(kw_only=True, eq=False)
class Bowl:
    """Parameters in groups, and a quadratic function with its minimum elsewhere: sum of c (p - target)^2 / 2."""

    groups: list[Group]
    targets: list[Tensor]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.groups for p in group.parameters]

    def value(self) -> float:
        pairs = enumerate(zip(self.parameters, self.targets, strict=True))
        return sum((i + 1) / 2 * float(((p.detach().double() - t.double()) ** 2).sum()) for i, (p, t) in pairs)

    def set_gradients(self) -> None:
        for i, (parameter, target) in enumerate(zip(self.parameters, self.targets, strict=True)):
            parameter.grad = ((parameter.detach() - target) * (i + 1)).to(parameter.dtype)

    def gradients(self) -> Tensor:
        """Return all gradients in a row, in float64."""
        import torch

        return torch.cat([p.grad.double().flatten() for p in self.parameters if p.grad is not None])

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]


def bowl(seed: int = 0, dtype: str = "float32", **settings: Any) -> Bowl:
    """Return matrices, an embedding table and a norm, each in its own group; `settings` go to every group."""
    import torch
    from torch import nn

    random = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(getattr(torch, dtype))

    shapes: dict[str, list[tuple[int, ...]]] = {"hidden": [(4, 3), (3, 5)], "embedding": [(6, 4)], "norm": [(5,)]}
    groups = []
    for role, sizes in shapes.items():
        parameters = [nn.Parameter(drawn(*size)) for size in sizes]
        names = [f"{role}.{i}.weight" for i in range(len(sizes))]
        groups.append(Group(parameters=parameters, names=names, role=role, **settings))  # type: ignore[arg-type]
    return Bowl(groups=groups, targets=[drawn(*p.shape) for g in groups for p in g.parameters])


def fill_gradients(part: Any, world: Bowl, step: int) -> None:
    """Fill the gradients of step `step` (from 0) as the loop does: by backward, or as the optimizer estimates them."""
    if has_default(part, "optimizer", "estimate_gradients"):
        world.set_gradients()
    else:
        part.estimate_gradients(world.value, step)


def take_step(optimizer: torch.optim.Optimizer, rate: float = RATE) -> None:
    """Take one step as the loop does: set each group's rate from its `lr_scale`, then step."""
    for group in optimizer.param_groups:
        assert "lr_scale" in group, "a group of the optimizer lost its lr_scale; build it from Group.settings()"
        group["lr"] = rate * group["lr_scale"]
    optimizer.step()


def _ran(subject: Subject, options: Any, world: Bowl, steps: int, rate: float = RATE) -> tuple[Any, Any]:
    """Return the part and its optimizer after some steps."""
    part = subject.build(options)
    optimizer = part.build(world.groups)
    for step in range(steps):
        fill_gradients(part, world, step)
        take_step(optimizer, rate)
    return part, optimizer


def _equal(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    import torch

    __tracebackhide__ = True
    for i, (one, two) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(one, two), f"{what}: parameter {i} differs by up to {float((one - two).abs().max()):.3g}"


@law(10, seed=drawn_seeds(), dtype=st.sampled_from(DTYPES))
def resumes_exactly(subject: Subject, options: Any, seed: int, dtype: str) -> None:
    """Two steps, a checkpoint as the engine writes and reads it, and two more steps equal four steps, bit for bit."""
    from luthier.state_tree import optimizer_state, restore_optimizer
    from luthier.testing.states import carry_tree

    straight, halted = bowl(seed, dtype), bowl(seed, dtype)
    _ran(subject, options, straight, 4)
    _, first = _ran(subject, options, halted, 2)
    carried = carry_tree({"optimizer": optimizer_state(first), "weights": halted.values()})
    resumed = bowl(seed, dtype)
    for parameter, weight in zip(resumed.parameters, carried["weights"], strict=True):
        parameter.data.copy_(weight)
    part = subject.build(options)
    second = part.build(resumed.groups)
    restore_optimizer(second, carried["optimizer"])
    for step in (2, 3):
        fill_gradients(part, resumed, step)
        take_step(second)
    _equal(resumed.values(), straight.values(), "a resumed run against a straight one")


@law(10, seed=drawn_seeds())
def is_deterministic(subject: Subject, options: Any, seed: int) -> None:
    """The same parameters and gradients give the same steps, bit for bit."""
    import torch

    one, two = bowl(seed), bowl(seed)
    _ran(subject, options, one, 3)
    torch.manual_seed(0)
    _ran(subject, options, two, 3)
    _equal(two.values(), one.values(), "a second run against the first")


@law(10, seed=drawn_seeds(), decay=st.sampled_from((None, 0.1)))
def leaves_parameters_without_gradient(subject: Subject, options: Any, seed: int, decay: float | None) -> None:
    """A parameter whose gradient is None keeps its value, whatever its decay."""
    import torch

    world = bowl(seed, weight_decay=decay)
    silent = world.parameters[0]
    before = silent.detach().clone()
    part = subject.build(options)
    optimizer = part.build(world.groups)
    for step in range(3):
        fill_gradients(part, world, step)
        silent.grad = None
        take_step(optimizer)
    assert torch.equal(silent.detach(), before), "a parameter without gradient was changed"


@law(3, default_only=True, seed=drawn_seeds())
def lowers_a_quadratic(subject: Subject, options: Any, seed: int) -> None:
    """With default options and some learning rate from 0.001 to 1, sixty steps halve a quadratic."""
    reached = []
    for rate in RATES:
        world = bowl(seed)
        start = world.value()
        _ran(subject, options, world, 60, rate)
        reached.append(world.value() / start)
        if reached[-1] < 0.5:
            return
    shown = ", ".join(f"{share:.3g} at {rate:g}" for rate, share in zip(RATES, reached, strict=True))
    raise AssertionError(f"after 60 steps the quadratic still has, as a share of its start: {shown}")


@law(10, seed=drawn_seeds(), dtype=st.sampled_from(DTYPES))
def keeps_dtype_and_device(subject: Subject, options: Any, seed: int, dtype: str) -> None:
    """Parameters stay the same objects, with their dtype, shape and device, and stay finite."""
    import torch

    world = bowl(seed, dtype)
    before = [(id(p), p.dtype, p.shape, p.device) for p in world.parameters]
    _, optimizer = _ran(subject, options, world, 2)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, parameters)) == sorted(entry[0] for entry in before), (
        "each parameter belongs to exactly one group"
    )
    for parameter, (_, kind, shape, device) in zip(world.parameters, before, strict=True):
        form = (parameter.dtype, parameter.shape, parameter.device)
        assert form == (kind, shape, device), f"{(kind, shape, device)} became {form}"
        assert torch.isfinite(parameter).all(), f"a {dtype} parameter is no longer finite"


@law(10, seed=drawn_seeds())
def respects_lr_scale_and_group_decay(subject: Subject, options: Any, seed: int) -> None:
    """Each group steps at the rate that the loop gives it, and decays as `Group.settings` says."""
    still = bowl(seed, lr_scale=0.0)
    before = still.values()
    _ran(subject, options, still, 2)
    _equal(still.values(), before, "groups with lr_scale 0 must stay where they are")
    plain, decayed = bowl(seed, weight_decay=0.0), bowl(seed, weight_decay=0.5)
    _ran(subject, options, plain, 2)
    _ran(subject, options, decayed, 2)
    alike = [i for i, (a, b) in enumerate(zip(plain.values(), decayed.values(), strict=True)) if a.equal(b)]
    assert not alike, f"a group's weight_decay of 0.5 or 0 makes no difference for parameters {alike}"
    own, plain = bowl(seed), bowl(seed, weight_decay=0.0)
    for world in (own, plain):
        _ran(subject, options, world, 1)  # after which an estimate would depend on the other parameters' decay
    _equal(own.values()[-1:], plain.values()[-1:], "a norm without a decay of its own must not decay")


@law(10, seed=drawn_seeds())
def learning_rate_zero_changes_nothing(subject: Subject, options: Any, seed: int) -> None:
    """At a rate of 0 every parameter stays as it is, decay or not."""
    world = bowl(seed, weight_decay=0.1)
    before = world.values()
    _ran(subject, options, world, 2, rate=0.0)
    _equal(world.values(), before, "steps with a learning rate of 0")


@law(10, seed=drawn_seeds())
def evaluating_restores_the_weights(subject: Subject, options: Any, seed: int) -> None:
    """`evaluating()` restores the weights afterwards, and the run continues as if it had not happened; it may be
    nested.
    """
    straight, evaluated = bowl(seed), bowl(seed)
    _ran(subject, options, straight, 4)
    part, optimizer = _ran(subject, options, evaluated, 2)
    before = evaluated.values()
    with part.evaluating():
        shown = evaluated.values()
        with part.evaluating():
            _equal(evaluated.values(), shown, "weights within a second evaluating")
        _equal(evaluated.values(), shown, "weights after a second evaluating")
    _equal(evaluated.values(), before, "weights after evaluating against those before")
    for step in (2, 3):
        fill_gradients(part, evaluated, step)
        take_step(optimizer)
    _equal(evaluated.values(), straight.values(), "a run that evaluated against one that did not")


@law(10, seed=drawn_seeds(), dtype=st.sampled_from(DTYPES))
def estimates_gradients_from_the_objective(subject: Subject, options: Any, seed: int, dtype: str) -> None:
    """An estimate fills every gradient, follows from the seed, leaves the weights, and on average points uphill.

    The record must say that it needs the run's "closure".
    """
    import torch

    world, part = bowl(seed, dtype), subject.build(options)
    if has_default(part, "optimizer", "estimate_gradients"):
        not_run("backward computes its gradients")
    assert "closure" in subject.record.needs, "it estimates gradients, and its record does not need 'closure'"
    part.build(world.groups)
    estimates = [_estimate(part, world, number) for number in range(ESTIMATES)]
    _equal([_estimate(part, world, 0)], estimates[:1], "a second estimate from the same seed")
    assert not torch.equal(estimates[0], estimates[1]), "another seed gives the same estimate"
    world.set_gradients()
    slope = float(world.gradients() @ sum(estimates))
    assert slope > 0, f"the mean of {ESTIMATES} estimates points downhill: {slope:.3g}"


def _estimate(part: Any, world: Bowl, seed: int) -> Tensor:
    """Return all gradients that a part estimates, and check that it leaves the weights."""
    before = world.values()
    for parameter in world.parameters:
        parameter.grad = None
    part.estimate_gradients(world.value, seed)
    _equal(world.values(), before, "weights after an estimate against those before")
    missing = [i for i, p in enumerate(world.parameters) if p.grad is None]
    assert not missing, f"the gradients of parameters {missing} were not filled"
    return world.gradients()


def live(subject: Subject, options: Any) -> None:
    """Use an optimizer in every way that a run does."""
    part, _ = _ran(subject, options, bowl(), 2)
    with part.evaluating():
        pass
