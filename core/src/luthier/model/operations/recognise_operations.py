"""Recognition: which modules of a model compute what our operations compute, by structure and by trying their forward.

A module's own forward is run on random numbers, its layers answered by functions of ours, and must give what ours
gives. So no class is listed, and neither the weights nor their dtype, quantizer or adapter matter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, cast

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from luthier.model.operations import reference
from luthier.model.operations.findings import Findings
from luthier.model.operations.kernels import Gate, NormForm
from luthier.model.weights.layers import HOOKS

ROWS: Final = 6
NORM_DTYPES: Final = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))
BOUNDS: Final = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 1e-2}  # relative to the largest number


@attrs.frozen(kw_only=True)
class Norm:
    """The form of an RMS norm besides its weight. `exact`: its own forward equals the operation in float64 too."""

    form: NormForm
    exact: bool


@attrs.frozen(kw_only=True)
class Mlp:
    """down(act(gate(x)) * up(x)) by the names of the layers; without `up` the gate's product holds both, gate first."""

    gate: str
    up: str | None
    down: str
    kind: Gate

    @property
    def inputs(self) -> list[str]:
        """Return the layers whose input is x."""
        return [self.gate] if self.up is None else [self.gate, self.up]


def find_norm(module: nn.Module, verified: bool = True, findings: Findings | None = None) -> Norm | None:
    """Return the norm that a module is, or None; why not goes to `findings`."""
    findings = findings or Findings()
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    if len(parameters) != 1 or weight is None or weight.dim() != 1:
        return None
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    sizes = [v for v in vars(module).values() if type(v) is float and 0.0 < v < 0.1]
    forms = [NormForm(eps=e, offset=o, rounded=r) for e in sizes for o in (0.0, 1.0) for r in (True, False)]
    if not verified:
        return Norm(form=forms[0], exact=False) if forms else None
    with unhurt_randomness(module) as random:
        faults = {
            form: sum(_norm_fault(module, form, dtypes, random, findings) for dtypes in NORM_DTYPES) for form in forms
        }
        form = min(faults, key=faults.__getitem__, default=None)
        if form is None or faults[form] == float("inf"):
            return None
        exact = _norm_fault(module, form, (torch.float64, torch.float64), random, findings) < float("inf")
        return Norm(form=form, exact=exact)


def _norm_fault(
    module: nn.Module,
    form: NormForm,
    dtypes: tuple[torch.dtype, torch.dtype],  # of x and of the weight
    random: torch.Generator,
    findings: Findings,
) -> float:
    """Return how far the form is from the module's own forward and gradients, inf beyond the bound of the dtype."""
    dtype, weight_dtype = dtypes
    own_weight = cast(Tensor, module.weight)
    size, device = own_weight.shape[0], own_weight.device
    device = torch.device("cpu") if device.type == "meta" else device  # the weights' values are not needed
    scales = torch.logspace(-4, 2, ROWS)[:, None]  # some rows are so small that eps has an effect
    x = (torch.randn(ROWS, size, generator=random) * scales).to(device, dtype).requires_grad_()
    weight = torch.randn(size, generator=random).to(device, weight_dtype).requires_grad_()
    grad = torch.randn(ROWS, size, generator=random).to(device)
    own = findings.attempt(
        lambda: _norm_results(lambda: functional_call(module, {"weight": weight}, (x,)), x, weight, grad)
    )
    if own is None:
        return float("inf")
    arguments = (x, weight, form.eps, form.offset, form.rounded)
    form_results = _norm_results(lambda: reference.rms_norm(*arguments), x, weight, grad)
    result = sum(measure_fault(one, other) for one, other in zip(own, form_results, strict=True))
    if result == float("inf"):
        findings.add_difference()
    return result


def _norm_results(compute: Callable[[], Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Return the result, and its gradients in x and the weight."""
    result = compute()
    return result, *torch.autograd.grad(result, (x, weight), grad.to(result.dtype))


def find_mlp(module: nn.Module, verified: bool = True, findings: Findings | None = None) -> Mlp | None:
    """Return the gated MLP that a module is, or None; why not goes to `findings`."""
    findings = findings or Findings()
    children = dict(module.named_children())
    layers = {name: child for name, child in children.items() if layer_sizes(child) is not None}
    acts = [child for name, child in children.items() if name not in layers]
    if len(acts) != 1 or len(layers) not in (2, 3) or any(True for _ in acts[0].parameters()):
        return None
    kind = _activation(acts[0], findings) if verified else "silu"
    if kind is None:
        return None
    return next((form for form in _forms(layers, kind) if not verified or _is_mlp(module, form, findings)), None)


def _forms(layers: dict[str, nn.Module], kind: Gate) -> Iterator[Mlp]:
    """Yield every reading of the layers whose sizes fit."""
    for down, last in layers.items():
        inner, outer = layer_sizes(last)  # type: ignore[misc]
        rest = [name for name in layers if name != down]
        wanted = (outer, inner if len(rest) == 2 else 2 * inner)
        if any(layer_sizes(layers[name]) != wanted for name in rest):
            continue
        if len(rest) == 1:
            yield Mlp(gate=rest[0], up=None, down=down, kind=kind)
        else:
            yield Mlp(gate=rest[0], up=rest[1], down=down, kind=kind)
            yield Mlp(gate=rest[1], up=rest[0], down=down, kind=kind)


def _is_mlp(module: nn.Module, form: Mlp, findings: Findings) -> bool:
    """Return True if its own forward, with random numbers from gate and up, hands down what the form says."""
    hidden = layer_sizes(module.get_submodule(form.down))[1]  # type: ignore[index]
    with unhurt_randomness(module) as random, ExitStack() as stack:
        x = torch.randn(1, ROWS, hidden, generator=random, dtype=torch.float64)
        for name in form.inputs:
            layer = module.get_submodule(name)
            made = torch.randn(1, ROWS, layer_sizes(layer)[1], generator=random, dtype=torch.float64)  # type: ignore[index]
            stack.enter_context(answered_forward(layer, lambda given, made=made: made * given.sum()))
        stack.enter_context(answered_forward(module.get_submodule(form.down), lambda given: given))
        stack.enter_context(training_mode(module))
        return forwards_agree(lambda: module(x), lambda: mlp_hidden(module, form, x, _act(form.kind)), findings)


def mlp_hidden(module: Any, form: Mlp, x: Tensor, act: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return what `down` is given; `act(gate, up)` is the gated activation."""
    gate = getattr(module, form.gate)(x)
    if form.up is None:
        return act(*gate.chunk(2, dim=-1))
    return act(gate, getattr(module, form.up)(x))


def _act(kind: Gate) -> Callable[[Tensor, Tensor], Tensor]:
    return reference.swiglu if kind == "silu" else reference.geglu


def _activation(act: nn.Module, findings: Findings) -> Gate | None:
    with unhurt_randomness(act) as random:
        x = torch.randn(64, generator=random, dtype=torch.float64) * 3
        if forwards_agree(lambda: act(x), lambda: F.silu(x), findings):
            return "silu"
        return "gelu" if forwards_agree(lambda: act(x), lambda: F.gelu(x, approximate="tanh"), findings) else None


# what recognition is made of


@contextmanager
def unhurt_randomness(module: nn.Module) -> Iterator[torch.Generator]:
    """Provide a random generator of our own and plain arithmetic, and leave the process's random state unchanged.

    Nobody who has hooked onto the module, or one inside it, hears of what is tried.
    """
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False), torch.enable_grad(), unheard(module):
        yield torch.Generator().manual_seed(0)


@contextmanager
def unheard(module: nn.Module) -> Iterator[None]:
    """Disable the hooks of the module, and of those inside it, within this context."""
    saved_hooks = [(each, {name: getattr(each, name) for name in HOOKS}) for each in module.modules()]
    try:
        for each, hooks in saved_hooks:
            vars(each).update({name: OrderedDict() for name in hooks})
        yield
    finally:
        for each, hooks in saved_hooks:
            vars(each).update(hooks)


@contextmanager
def answered_forward(module: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Let this one module return `answer` instead of calling its forward, within this context."""
    before = vars(module).get("forward")
    module.forward = answer
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def training_mode(module: nn.Module) -> Iterator[None]:
    """Put this one module into training mode within this context, so that a dropout of its own is noticed."""
    before, module.training = module.training, True
    try:
        yield
    finally:
        module.training = before


def forwards_agree(own: Callable[[], Any], ours: Callable[[], Any], findings: Findings) -> bool:
    """Return True if a module's own forward gives what ours gives; why not goes to `findings`."""
    theirs = findings.attempt(own)
    if theirs is None:
        return False
    if measure_fault(theirs, ours()) < float("inf"):
        return True
    findings.add_difference()
    return False


def measure_fault(own: Any, computed: Tensor) -> float:
    """Return the largest difference over the largest number, inf beyond the bound of the dtype or for another shape."""
    if not isinstance(own, Tensor) or own.shape != computed.shape or own.dtype is not computed.dtype:
        return float("inf")
    if not bool(own.any()):
        return float("inf")  # zeros prove nothing
    own, computed = own.detach(), computed.detach()
    share = float((own - computed).abs().max() / own.abs().max())
    return share if share <= BOUNDS[own.dtype] else float("inf")


def layer_sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) features; None where a layer does not say, which no contract of a plugin asks of it."""
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]
