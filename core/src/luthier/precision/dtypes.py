"""Precision: what products are computed in, what dtype weights are held and stepped in, and why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

import attrs
import torch
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.hardware.low_precision import bf16_feature, imitates_dtype
from luthier.logs import get_logger
from luthier.plugins.contracts.protocols import Adapter, Optimizer
from luthier.precision import weight_dtypes as storage
from luthier.precision.bf16_steps import MasterStep, StochasticStep, newest_master, put_tensor
from luthier.precision.loss_scaler import LossScaler
from luthier.recipe import Recipe
from luthier.runs.writing.decisions import Decisions

log = get_logger()
WIDE_ENOUGH: Final = 192  # the hidden size from which a CPU's whole step gains from bfloat16
COMPUTED_IN: Final = {"bf16": torch.bfloat16, "pure_bf16": torch.bfloat16, "fp16": torch.float16}


@attrs.frozen(kw_only=True)
class Facts:
    """The facts by which `auto` is decided. `trains` and `weights` are the dtypes of the trainable weights and the
    model.
    """

    device: str
    feature: str | None  # the processor feature that computes bfloat16 here
    hidden: int
    trains: torch.dtype
    weights: torch.dtype
    sharded: bool = False


def choose(facts: Facts) -> tuple[str, str]:
    """Return what `auto` stands for, and why."""
    here = "this GPU" if facts.device == "cuda" else "this processor"
    narrow = f"products of hidden size {facts.hidden}, less than {WIDE_ENOUGH}, gain little from bfloat16"
    rules = (
        (facts.weights is torch.float64, "float64", "the model is in float64"),
        (
            facts.trains is torch.bfloat16 and not facts.sharded,
            "pure_bf16",
            "the weights that train were loaded in bfloat16",
        ),
        (facts.weights is torch.bfloat16, "bf16", "the model was loaded in bfloat16"),
        (facts.device == "mps", "float32", "bfloat16 is not known to be faster on MPS"),
        (facts.feature is None, "float32", f"{here} has no bfloat16 arithmetic"),
        (facts.device == "cpu" and facts.hidden < WIDE_ENOUGH, "float32", narrow),
        (True, "bf16", f"{facts.feature} computes bfloat16 products faster, at equal loss"),
    )
    return next((name, reason) for holds, name, reason in rules if holds)


def refuse_precision(asked: str, device: torch.device, *, sharded: bool = False) -> None:
    """Raise `recipe-conflict` for a precision that this device, or a model in shards, does not train in."""
    if asked == "pure_bf16" and sharded:
        problem = "weights that are stepped in bfloat16 cannot be sharded"
        raise LuthierError("recipe-conflict", problem, where="precision", found=asked,
                           remedy="Choose bf16, or distributed.strategy: ddp.")  # fmt: skip
    if asked == "fp16" and device.type != "cuda":
        remedy = "Choose auto, bf16 or float32, or a CUDA device."
        problem = f"float16 products are for CUDA devices, and on {device.type} they would be many times slower"
        raise LuthierError("recipe-conflict", problem, where="precision", found=asked, remedy=remedy)


def decide(
    recipe: Recipe, model: Any, trained: Sequence[Tensor], device: torch.device, decisions: Decisions,
    *, sharded: bool = False,
) -> str:  # fmt: skip
    """Return the precision of this run: the recipe's, or what `choose` says."""
    kinds = {p.dtype for p in trained}
    facts = Facts(
        device=device.type,
        feature=bf16_feature(device),
        hidden=hidden_size(model),
        trains=kinds.pop() if len(kinds) == 1 else torch.float32,
        weights=model.dtype,
        sharded=sharded,
    )
    if recipe.precision == "auto":
        name = decisions.take("precision", lambda: choose(facts))
        _warn(name, device, "model.dtype: float32, where there is memory for it")
        return name
    refuse_precision(recipe.precision, device, sharded=sharded)
    if facts.weights is torch.float64:
        remedy = "Leave precision out, or set model.dtype: float32."
        raise LuthierError("recipe-conflict", "the model is in float64", where="precision", found=recipe.precision,
                           remedy=remedy)  # fmt: skip
    _warn(recipe.precision, device, "precision: float32")
    return decisions.explicit("precision", recipe.precision)


def _warn(name: str, device: torch.device, remedy: str) -> None:
    """Warn if this dtype is emulated, and so slow, on this device."""
    if imitates_dtype(device, COMPUTED_IN.get(name, torch.float32)):
        log.warning(
            "no bfloat16 arithmetic here: float32 would be many times faster", device=str(device), remedy=remedy
        )


class SteppingParts(Protocol):
    """Parts of which one says what trains, and the other steps it."""

    @property
    def adapter(self) -> Adapter: ...

    @property
    def optimizer(self) -> Optimizer: ...


def settle_precision(
    recipe: Recipe, model: Any, parts: SteppingParts, device: torch.device, decisions: Decisions,
    undo: contextlib.ExitStack, *, sharded: bool = False,
) -> Precision:  # fmt: skip
    """Decide it and put the model's weights into it, until `undo` is closed; what is sharded stays in it."""
    trained = [p for group in parts.adapter.groups() for p in group.parameters]
    name = decide(recipe, model, trained, device, decisions, sharded=sharded)
    precision = Precision.of(recipe, name, device, parts.optimizer)
    precision.sharded = sharded
    undo.enter_context(precision.held(model, trained))
    return precision


def hidden_size(model: Any) -> int:
    """Return the model's width; 0 where its config does not say."""
    return getattr(model.config.get_text_config(), "hidden_size", 0)


@attrs.define(kw_only=True, eq=False)
class Precision:
    """One run's precision; the default is to compute in whatever the weights are."""

    name: str = "float32"
    device: str = "cpu"
    seed: int = 0
    keeps_masters: bool = False  # pure_bf16_update: float32_masters
    sharded: bool = False  # shards are neither the weights that came nor those that are saved, so none are restored
    kept: list[Tensor] = attrs.field(factory=list)  # tensors kept besides the model's weights
    separable: bool = False  # True if the optimizer can step some parameters without the others
    scaler: LossScaler | None = None
    stepping: StochasticStep | MasterStep | None = None

    @classmethod
    def of(cls, recipe: Recipe, name: str, device: torch.device, optimizer_part: Any) -> Precision:
        return cls(
            name=name,
            device=device.type,
            seed=recipe.seed,
            keeps_masters=recipe.pure_bf16_update == "float32_masters",
            separable=getattr(optimizer_part, "separable", False),
            scaler=LossScaler() if name == "fp16" else None,
        )

    @property
    def is_low(self) -> bool:
        """Return True if products are computed in less than float32."""
        return self.name in COMPUTED_IN

    def computing(self) -> AbstractContextManager[Any]:
        """Compute products in the run's dtype within this context, whatever their operands are in."""
        dtype = COMPUTED_IN.get(self.name)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device, dtype)

    @contextlib.contextmanager
    def held(self, model: Any, trained: Sequence[nn.Parameter]) -> Iterator[None]:
        """Give the weights the dtypes that the run trains them in within this context, and restore the model after it.

        Frozen ones are in the dtype of products, so that none is cast in every step; trained ones in float32, but for
        pure_bf16. What was trained in another dtype than it came in is rounded to that.
        """
        if self.name == "float64":
            yield
            return
        low = COMPUTED_IN.get(self.name, torch.float32)
        with contextlib.ExitStack() as undo:
            self._hold_frozen(model, low, undo)
            self._hold_trained(trained, undo)
            for module in _widening(model) if low is not torch.float32 else ():
                undo.callback(module.register_forward_hook(narrow_output).remove)
            if self.sharded:
                undo.pop_all()
            yield

    def lower_companion(self, model: Any) -> None:
        """Give a frozen model, which nobody saves, the dtype of the run's products; what that cuts off is lost.

        Its layers compute as those of the frozen model that trains, and no weight is cast in every step.
        """
        low = COMPUTED_IN.get(self.name)
        for parameter in () if low is None else storage.frozen_weights(model, low):
            put_tensor(parameter, parameter.detach().to(low))

    def scaled(self, objective: Tensor | None) -> Tensor | None:
        """Return what backward begins from."""
        return objective if self.scaler is None or objective is None else self.scaler.scaled(objective)

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide the gradients of the global batch by the loss scale, before anyone reads them."""
        if self.scaler is not None:
            self.scaler.unscale(gradients)

    def overflowed(self, norm_is_finite: bool, index: int) -> bool:
        """Return True if step `index` is to be left out because the scaled gradient left float16's range."""
        if self.scaler is None:
            return False
        self.scaler.judge(norm_is_finite, index + 1)
        return not norm_is_finite

    def step(self, optimizer: torch.optim.Optimizer, index: int) -> None:
        """Run optimizer step `index` (0-based)."""
        if self.stepping is None:
            optimizer.step()
        else:
            self.stepping.step(optimizer, index)

    def state(self) -> dict[str, Any]:
        state = {"scaler": self.scaler, "stepping": self.stepping}
        return {name: part.state() for name, part in state.items() if part is not None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, part in (("scaler", self.scaler), ("stepping", self.stepping)):
            if part is not None and name in state:
                part.load_state(state[name])

    def _hold_frozen(self, model: Any, low: torch.dtype, undo: contextlib.ExitStack) -> None:
        exact = self.sharded or getattr(model, "published_in", None) is low
        for parameter in storage.frozen_weights(model, low):
            weight = storage.hold_weight(parameter, low, exact=exact)
            undo.callback(weight.restore)
            if weight.rest is not None:
                self.kept.append(weight.rest)
        undo.callback(self.kept.clear)

    def _hold_trained(self, trained: Sequence[nn.Parameter], undo: contextlib.ExitStack) -> None:
        pure = self.name == "pure_bf16"
        masters: dict[nn.Parameter, Tensor] = {}
        for parameter in trained:
            if parameter.dtype not in storage.FLOATS:
                continue
            came, wide = parameter.dtype, parameter.detach().float()
            undo.callback(_give_back, parameter, came, masters)
            put_tensor(parameter, wide.to(torch.bfloat16) if pure else wide)
            if pure:
                parameter.grad_dtype = torch.float32  # the gradients of many micro-batches are added in this dtype
                masters |= {parameter: wide} if self.keeps_masters else {}
        if pure:
            self.stepping = MasterStep(masters) if masters else StochasticStep(self.seed, separable=self.separable)
            self.kept.extend(masters.values())
            undo.callback(setattr, self, "stepping", None)


def _give_back(parameter: nn.Parameter, came: torch.dtype, masters: Mapping[nn.Parameter, Tensor]) -> None:
    parameter.grad = None
    wide = newest_master(masters[parameter], parameter) if parameter in masters else parameter.detach()
    put_tensor(parameter, wide.to(came))
    parameter.grad_dtype = came


def _widening(model: Any) -> Iterator[nn.Module]:
    """Layers that would make float32 of what they get, because their float32 weights train: embeddings and norms.

    Products in bfloat16 lose no more by inputs in bfloat16: measured on 8 and on 32 layers, gradients differ from
    float32's by 1.5 to 2.2 % of their norm either way.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        kind = isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        if kind and isinstance(weight, nn.Parameter) and weight.requires_grad:
            yield module


def narrow_output(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Return a product's output in the dtype of products, if the run has one; it is a forward hook."""
    if not isinstance(output, Tensor) or not torch.is_autocast_enabled(output.device.type):
        return output
    return output.to(torch.get_autocast_dtype(output.device.type))
