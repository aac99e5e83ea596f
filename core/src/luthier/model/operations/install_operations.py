"""Operations in a model: recognised modules get forwards of their own, on the instance, until they are taken back."""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import attrs
from torch import nn

from luthier.logs import get_logger
from luthier.model.operations.findings import Finding, Findings
from luthier.model.operations.forwards import (
    Forward,
    Layer,
    are_products,
    attention_forward,
    layer_forward,
    linear_forward,
    linear_layers,
    mlp_forward,
    norm_forward,
)
from luthier.model.operations.functions import list_implementations
from luthier.model.operations.kernels import EAGER
from luthier.model.operations.recognise_layers import Block, find_attention, find_block
from luthier.model.operations.recognise_operations import Norm, find_mlp, find_norm
from luthier.model.operations.signatures import Operations, set_active

log = get_logger()


Find = Callable[[nn.Module, bool, Findings], Any]
FINDERS: Final[dict[str, Find]] = {
    "norm": find_norm,
    "mlp": find_mlp,
    "attention": find_attention,
    "layer": find_block,
}


@attrs.define(eq=False)
class Installed:
    """The modules that were replaced, and those that only look as if they could be, by kind and class."""

    operations: Operations
    replaced: dict[str, dict[str, int]] = attrs.field(factory=dict)
    left: dict[str, dict[str, Finding]] = attrs.field(factory=dict)
    widths: Counter[str] = attrs.field(
        factory=Counter
    )  # elements per token that pass through norm, rope, silu and gelu
    sizes: set[tuple[str, int]] = attrs.field(factory=set)  # the distinct rows among them
    _forwards: list[tuple[nn.Module, Any]] = attrs.field(factory=list)
    _undo: list[Callable[[], None]] = attrs.field(factory=list)

    def count(self, module: Any, kind: str, form: Any) -> None:
        """Add what one token costs in this module."""
        rows = []
        if kind == "norm":
            rows = [("norm", module.weight.numel())]
        elif kind == "mlp":
            rows = [(form.kind, getattr(module, form.down).in_features)]
        elif kind == "attention":
            outer = module.q_proj.out_features + module.k_proj.out_features
            rows = [("rope", outer), *([("norm", outer)] if form.normed else [])]
        self.sizes.update(rows)
        for name, width in rows:
            self.widths[name] += width

    def remove(self) -> None:
        """Give every module its own forward back; nothing the second time."""
        while self._undo:
            self._undo.pop()()
        while self._forwards:
            module, forward = self._forwards.pop()
            if vars(module).get("forward") is forward:  # not a forward that somebody has wrapped around it since
                del module.forward  # makes the class's own forward visible again


def ordinary_operations() -> Operations:
    """Return what runs everywhere: autograd functions over torch's own kernels, with little kept for backward."""
    return Operations(list_implementations("eager", EAGER, lambda device, dtype, shape: True))


@contextmanager
def installed_operations(model: nn.Module, operations: Operations, *, verified: bool = True) -> Iterator[Installed]:
    """Let the model compute by `operations` within this context."""
    installed = install(model, operations, verified=verified)
    try:
        yield installed
    finally:
        installed.remove()


def install(model: nn.Module, operations: Operations, *, verified: bool = True) -> Installed:
    """Let every norm, MLP, attention and layer that is recognised compute by `operations`.

    What is not recognised, or has a forward of its own on the instance, is left alone. `verified` False: structure
    alone decides, for a model without weights that is never asked for numbers.
    """
    recogniser = _Found(verified)
    named = {name: module for name, module in model.named_modules() if "forward" not in vars(module)}
    forms = {name: form for name, module in named.items() if (form := recogniser.form(module)) is not None}
    if operations.has_offers("linear"):  # otherwise nn.Linear's own forward is as good, and tools recognise it
        forms |= {name: ("linear", None) for name in linear_layers(model) if name in named}
    installed = Installed(operations, replaced=recogniser.counts(forms, named), left=recogniser.left)
    for name, (kind, form) in forms.items():
        forward = types.MethodType(_forward(named[name], kind, form, operations, recogniser), named[name])
        named[name].forward = forward
        installed.count(named[name], kind, form)
        installed._forwards.append((named[name], forward))
    set_active(model, operations)
    installed._undo.append(functools.partial(set_active, model, None))
    log.debug("operations installed", **{kind: sum(n.values()) for kind, n in installed.replaced.items()})
    for kind, classes in installed.left.items():
        for name, finding in classes.items():
            log.debug("own forward kept", kind=kind, module=name, reason=finding.reason, detail=finding.detail)
    return installed


class _Found:
    """The forms of modules; those that nothing could tell apart are tried once."""

    def __init__(self, verified: bool) -> None:
        self.verified = verified
        self.left: dict[str, dict[str, Finding]] = {}
        self._known: dict[Any, tuple[str, Any] | None] = {}

    def form(self, module: nn.Module) -> tuple[str, Any] | None:
        key = _nature(module)
        if key not in self._known:
            self._known[key] = self._find(module)
        return self._known[key]

    def counts(self, forms: dict[str, Any], named: dict[str, nn.Module]) -> dict[str, dict[str, int]]:
        counters: dict[str, Counter[str]] = {}
        for name, (kind, _) in forms.items():
            counters.setdefault(kind, Counter())[type(named[name]).__name__] += 1
        return {kind: dict(counter) for kind, counter in counters.items()}

    def norms(self, module: nn.Module, block: Block) -> list[Norm | None]:
        """Return the block's first and second norm."""
        names = (block.first_norm, block.second_norm)
        forms = [self.form(child) for child in map(module.get_submodule, names) if "forward" not in vars(child)]
        return [*(form[1] if form and form[0] == "norm" else None for form in forms), None, None][:2]

    def _find(self, module: nn.Module) -> tuple[str, Any] | None:
        for kind, find in FINDERS.items():
            findings = Findings()
            form = find(module, self.verified, findings)
            if isinstance(form, Block) and None in self.norms(module, form):
                return None
            if form is not None:
                return kind, form
            finding = findings.closest()
            if self.verified and finding is not None:
                self.left.setdefault(kind, {})[type(module).__name__] = finding
        return None


def _nature(module: nn.Module) -> Any:
    """Return all that a forward can depend on besides tensors and what its children compute."""
    plain = {n: v for n, v in vars(module).items() if v is None or isinstance(v, (bool, int, float, str))}
    children = tuple((name, type(child)) for name, child in module.named_children())
    return type(module), tuple(sorted(plain.items(), key=repr)), children, id(getattr(module, "config", None))


def _forward(module: Any, kind: str, form: Any, operations: Operations, recognised: _Found) -> Forward:
    own = type(module).forward
    if kind == "norm":
        return norm_forward(operations, form, own)
    if kind == "mlp":
        return mlp_forward(operations, form)
    if kind == "linear":
        return linear_forward(operations, own)
    if kind == "attention":
        return attention_forward(operations, form, own)
    return layer_forward(operations, _layer(module, form, recognised), own)


def _layer(module: Any, block: Block, recognised: _Found) -> Layer:
    first, second = recognised.norms(module, block)
    assert first is not None and second is not None, "a block has two norms"
    attention, mlp = getattr(module, block.attention), getattr(module, block.mlp)
    heads, gates = recognised.form(attention), recognised.form(mlp)
    lowers = (
        heads is not None
        and heads[0] == "attention"
        and are_products([attention.q_proj, attention.k_proj, attention.v_proj]),
        gates is not None and gates[0] == "mlp" and are_products([getattr(mlp, n) for n in gates[1].inputs]),
    )
    return Layer(block=block, first=first, second=second, lowers=lowers)
