"""What each part is: protocols, not base classes. Torch appears only in annotations.

Shapes in brackets: T tokens of the packed batch, D documents in it, V vocabulary, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import attrs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Role = Literal["hidden", "embedding", "head", "norm", "bias", "adapter"]


@attrs.frozen(kw_only=True)
class Group:
    """Trainable parameters that share a learning rate and a decay."""

    parameters: list[nn.Parameter]
    names: list[str]
    role: Role = "hidden"
    lr_scale: float = 1.0  # times the run's learning rate
    weight_decay: float | None = None  # None: the optimizer's own, and 0 for norms and biases

    def settings(self, weight_decay: float = 0.0) -> dict[str, Any]:
        """This group as torch's optimizers take it; the loop sets `lr` to the schedule's rate times `lr_scale`."""
        own = 0.0 if self.role in ("norm", "bias") else weight_decay
        decay = own if self.weight_decay is None else self.weight_decay
        return {"params": self.parameters, "lr_scale": self.lr_scale, "weight_decay": decay}


@attrs.frozen(kw_only=True)
class Progress:
    """Where a run stands: `step` of `total_steps` optimizer steps are done, in epoch `epoch` (fractional).

    `total_steps` is None for a run whose end is not known, such as one that only a signal stops.
    """

    step: int
    total_steps: int | None
    epoch: float


@attrs.frozen(kw_only=True)
class Multipliers:
    """What a quantizer's schedule does to the rates of this step."""

    lr: float = 1.0
    weight_decay: float = 1.0


@attrs.frozen(kw_only=True)
class Context:
    """What a part may know of the run it joins.

    `dequantize(layer)` gives a layer's weight in float32 [out, in], quantized or not; `requantize(layer, weight)` puts
    one back; `original(layer)` reads the unquantized weight again from the checkpoint, and raises `LuthierError` where
    there is none. `batches(n)` gives the first n batches of the training data. `log(name, value)` adds a number to
    the step's metrics. `probe(model)` compares packed with separate documents and says why they differ, or None.
    `save_model(model, folder)` writes a dense model in transformers' layout, in the run's `save_dtype` and shards.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype
    seed: int
    total_steps: int | None
    log: Callable[[str, float], None]
    dequantize: Callable[[nn.Module], Tensor]
    requantize: Callable[[nn.Module, Tensor], None]
    original: Callable[[nn.Module], Tensor]
    batches: Callable[[int], Iterable[Any]]
    probe: Callable[[Any], str | None] = lambda model: None
    save_model: Callable[[Any, Path], None] = lambda model, folder: model.save_pretrained(folder)


@dataclasses.dataclass(frozen=True, kw_only=True)  # DDP finds the tensors of a dataclass
class LossOutput:
    """Sums, never means: `sums` are scalars with gradient; `metrics` are (sum, count) without."""

    sums: dict[str, Tensor]
    metrics: dict[str, tuple[float | Tensor, float | Tensor]] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Policy(Protocol):
    """The model as a loss sees it: log-probabilities and chunks of logits, never all logits."""

    def token_logprobs(self, batch: Any, want: Sequence[str] = ()) -> Any:
        """[T] float32: entry t is log p(labels[t]), 0 where labels[t] is -100.

        With `want` (of "entropy", "top1"), a pair of that and a dict of [T] float32 from the same pass.
        """

    def map_logits(self, batch: Any, function: Callable[..., Any], *per_token: Any, other: Any = None) -> Any:
        """`function(logits [C, V], labels [C], *per_token [C, ...])` over chunks of the supervised positions, scattered
        to [T, ...] with 0 elsewhere, recomputed in backward. With `other`, a policy, its logits come last."""

    def hidden(self, batch: Any, layers: Sequence[int]) -> list[Any]:
        """[T, H] for each layer asked for; -1 is what the head reads."""

    def score(self, batch: Any) -> Any:
        """[D] float32: the output of a scalar head at each document's last token."""

    def reference(self) -> Policy:
        """The policy without the adapter, without gradient."""

    def teacher(self) -> Policy:
        """The teacher that the recipe names."""


@runtime_checkable
class Adapter(Protocol):
    """What of the model trains. Class and module paths of the model stay as they are."""

    def attach(self, model: Any, context: Context) -> Any:
        """Wrap layers in place, quantized or not, freeze the rest, and return the model."""

    def groups(self) -> list[Group]:
        """Every trainable parameter, in exactly one group."""

    def prepare(self, batch: Any) -> Any:
        """The batch, with virtual tokens for each document where a prompt method has them."""

    def disabled(self) -> AbstractContextManager[None]:
        """Within it the model computes what it did before `attach`."""

    def gradients_ready(self) -> None:
        """All gradients of the global batch are summed; before clipping."""

    def stepped(self, progress: Progress) -> None:
        """The optimizer has stepped."""

    def penalty(self) -> Any:
        """A scalar added to the objective of the global batch, once a step; None for none."""

    def state(self) -> dict[str, Any]:
        """All that resume needs, as tensors and JSON values."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take `state()` back, into the parameters that exist."""

    def save(self, folder: Path) -> None:
        """Write the adapter alone, in PEFT's layout where there is one."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote into the attached adapter."""

    def merge(self, context: Context) -> Any:
        """The model with the adapter folded into its weights and the wrappers gone."""

    def begin_task(self, index: int) -> None: ...

    def end_task(self, index: int) -> None: ...


@runtime_checkable
class Loss(Protocol):
    """What is minimised. `couples = "batch"` needs `scores(policy, batch) -> [D, ...]` and `combine(all)` beside it.

    `coefficients(batch) -> [T] or None` may give d total / d log-probability where it is known before forward.
    """

    data: str

    def terms(self, batch: Any) -> dict[str, float]:
        """This micro-batch's share of each term's denominator."""

    def __call__(self, policy: Any, batch: Any) -> LossOutput:
        """The sum of each term over this micro-batch."""


@runtime_checkable
class Optimizer(Protocol):
    """How a gradient becomes a step.

    `separable = True` says that what is built may be stepped with the gradients of some parameters, then of others,
    with the result of one step: nothing in it goes beyond one parameter. Bfloat16 weights then need less room.
    """

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        """An optimizer over the groups (see `Group.settings`); the loop sets each `lr` before every step."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Around evaluation and saving, for optimizers whose best weights are not those they step."""


@runtime_checkable
class Quantizer(Protocol):
    """How the base model's weights are stored. A quantized layer keeps `in_features` and `out_features`."""

    def load_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""

    def apply(self, model: Any) -> Any:
        """Replace the model's weights by quantized ones, in place, and return the model."""

    def dequantize(self, layer: Any) -> Any:
        """The layer's weight [out, in] in float32, or None for a layer that is not this quantizer's."""

    def requantize(self, layer: Any, weight: Any) -> None:
        """Put a float32 weight [out, in] into a quantized layer."""

    def export(self, model: Any, folder: Path) -> None:
        """Write the quantized model."""

    def progressed(self, progress: Progress) -> Multipliers:
        """Called before each step."""


@runtime_checkable
class Callback(Protocol):
    """Any object with methods marked `@luthier.event`; what else it may have stands with the events."""


MEMBERS: dict[str, tuple[str, ...]] = {
    "adapter": ("attach", "groups", "prepare", "disabled", "gradients_ready", "stepped", "penalty", "state",
                "load_state", "save", "load", "merge", "begin_task", "end_task"),
    "loss": ("data", "terms", "__call__"),
    "optimizer": ("build", "evaluating"),
    "quantizer": ("load_arguments", "apply", "dequantize", "requantize", "export", "progressed"),
    "provider": ("check",),  # jobs bring the rest, and check it
    "callback": (),
}  # fmt: skip
