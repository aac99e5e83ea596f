"""The values that the engine and parts hand to each other. Torch appears only in annotations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from luthier.errors import LuthierError

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
    weight_decay: float | None = None  # None: the optimizer's own value, but 0 for norms and biases

    def settings(self, weight_decay: float = 0.0) -> dict[str, Any]:
        """Return this group as torch's optimizers take it; the loop sets `lr` (schedule's rate times `lr_scale`)."""
        own = 0.0 if self.role in ("norm", "bias") else weight_decay
        decay = own if self.weight_decay is None else self.weight_decay
        return {"params": self.parameters, "lr_scale": self.lr_scale, "weight_decay": decay}


@attrs.frozen(kw_only=True)
class Progress:
    """The position of a run: `step` of `total_steps` optimizer steps are done, in epoch `epoch` (a fraction).

    `total_steps` is None if the run's end is not known, for example if only a signal ends it.
    """

    step: int
    total_steps: int | None
    epoch: float


@attrs.frozen(kw_only=True)
class Multipliers:
    """The factors by which a quantizer's schedule changes this step's learning rate and weight decay."""

    lr: float = 1.0
    weight_decay: float = 1.0


Purpose = Literal["plan", "hollow", "train", "open"]


def refuse_over(batches: Iterable[Any], function: Callable[[Any, Any], Any]) -> list[Any]:
    """Raise `part-unsupported`. It is the default of `Context.over` as long as there is no step to run batches in."""
    raise LuthierError("part-unsupported", "context.over may be used from Loss.begin on", where="context.over",
                       remedy="Call it in the loss's begin(context).")  # fmt: skip


def compute_uncached(key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return `compute()`. It is the default of `Context.cache` where there is no folder to keep tensors in."""
    return compute()


@attrs.frozen(kw_only=True)
class Context:
    """A view of the run for a part. `attach`, `apply`, `merge` and `begin` get it.

    `purpose` says why the part is called: "plan" (fake tensors; nothing is trained), "hollow" (a rank whose weights are
    on the meta device until rank 0 sends them), "train", or "open" (a whole model, for saving, merging or generating).
    `has_values` is False if the weights are fake or on the meta device: then no number may be read from them. `config`
    is the model's own transformers config. `device` and `dtype` are those of the model's weights. `seed` is the run's;
    torch's generators are seeded from it before `attach`. `total_steps` is None for a run without a known end.

    - `log(name, value)` adds a number to the metrics of the current step.
    - `dequantize(layer)` returns the layer's weight in float32 [out, in], quantized or not.
    - `requantize(layer, weight)` puts such a weight back.
    - `original(layer)` reads the unquantized weight [out, in] float32 from the checkpoint again. It raises
      `LuthierError` if there is no checkpoint.
    - `batches(n)` returns the first n packed batches of the training data; fewer if the data has fewer.
    - `over(batches, function)` calls `function(policy, batch)` inside `Step`, without gradient or dropout, equally
      often on every rank, and returns the results (trees of tensors and JSON values) of all ranks, in the order of the
      batches. It may be used from `Loss.begin` on; a rehearsal calls the function with the first batch alone.
    - `forward(model, batch)` runs the model's body over a packed batch without gradient or dropout and returns the
      states [T, H] that the head reads. It may be used before the adapter is attached; hooks on layers are called.
    - `decide(name, function, bound=None)` calls `function()` on rank 0 and returns its JSON value on every rank. A
    resume
      and the opening of the artifact return the recorded value. Every rank must call it, in the same order, even if its
      weights have no values; in a plan it returns `bound`.
    - `progress(total, text)` returns a function `advance(n=1)` that moves the progress bar of a long preparation.
    - `cache(key, compute)` returns the tensors of `compute()`, stored on disk under a hash of `key`. The key must name
      everything that the result depends on, such as the hash of a weight and the options.
    - `probe(model)` compares packed with separate documents and returns a sentence on how they differ, or None.
    - `save_model(model, folder)` writes a model in transformers' layout, in the run's `save_dtype` and shards; a model
      whose quantized layers are trained is written by its quantizer.
    - `load_model(folder, model)` returns the model that `save_model` wrote; it may fill `model`, one of the same shape.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype
    seed: int
    total_steps: int | None
    purpose: Purpose = "train"
    has_values: bool = True
    log: Callable[[str, float], None]
    dequantize: Callable[[nn.Module], Tensor]
    requantize: Callable[[nn.Module, Tensor], None]
    original: Callable[[nn.Module], Tensor]
    batches: Callable[[int], Iterable[Any]]
    over: Callable[[Iterable[Any], Callable[[Any, Any], Any]], list[Any]] = refuse_over
    forward: Callable[[Any, Any], Tensor]
    decide: Callable[..., Any] = lambda name, function, bound=None: function()
    progress: Callable[[int, str], Callable[..., None]] = lambda total, text: lambda n=1: None
    cache: Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]] = compute_uncached
    probe: Callable[..., str | None] = lambda model, packing=True: None
    save_model: Callable[[Any, Path], None] = lambda model, folder: model.save_pretrained(folder)
    load_model: Callable[[Path, Any], Any] = lambda folder, model: type(model).from_pretrained(folder)


@dataclasses.dataclass(frozen=True, kw_only=True)  # DDP looks for tensors inside dataclasses, not inside other classes
class LossOutput:
    """The result of a loss: sums, never means. `sums` are scalars with gradient; `metrics` are (sum, count) without."""

    sums: dict[str, Tensor]
    metrics: Mapping[str, tuple[float | Tensor, float | Tensor]] = dataclasses.field(default_factory=dict)


@attrs.frozen(kw_only=True, eq=False)
class TokenStatistics:
    """The supervised tokens of one micro-batch, as a metric over tokens sees them: tensors [S], without gradient.

    `entropy` and `top1` (1 if the label is the most likely token) are None if the record does not want them.
    """

    labels: Tensor
    logprobs: Tensor
    weights: Tensor
    entropy: Tensor | None = None
    top1: Tensor | None = None
