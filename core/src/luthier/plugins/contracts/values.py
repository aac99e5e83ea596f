"""The values that the engine and the parts exchange. Torch appears only in annotations."""

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
    """Trainable parameters that share a learning rate and a weight decay.

    `role` is "hidden", "embedding", "head", "norm", "bias" or "adapter"; optimizers and penalties may treat roles
    differently. `lr_scale` multiplies the learning rate of the run. A `weight_decay` of None means the optimizer's own,
    and 0 for norms and biases.
    """

    parameters: list[nn.Parameter]
    names: list[str]
    role: Role = "hidden"
    lr_scale: float = 1.0  # times the run's learning rate
    weight_decay: float | None = None  # None: the optimizer's own value, but 0 for norms and biases

    def settings(self, weight_decay: float = 0.0) -> dict[str, Any]:
        """Return this group as torch's optimizers take it. The core sets `lr` before every step."""
        own = 0.0 if self.role in ("norm", "bias") else weight_decay
        decay = own if self.weight_decay is None else self.weight_decay
        return {"params": self.parameters, "lr_scale": self.lr_scale, "weight_decay": decay}


@attrs.frozen(kw_only=True)
class Progress:
    """The position of a run: `step` of `total_steps` optimizer steps are done, and `epoch` epochs (fractional).

    `total_steps` is None if the end is not known, as in a run that only a signal stops.
    """

    step: int
    total_steps: int | None
    epoch: float


@attrs.frozen(kw_only=True)
class Multipliers:
    """The factors by which a quantizer changes the learning rate and the weight decay of one step."""

    lr: float = 1.0
    weight_decay: float = 1.0


Purpose = Literal["plan", "hollow", "train", "open"]


def refuse_over(batches: Iterable[Any], function: Callable[[Any, Any], Any]) -> list[Any]:
    """Raise `part-unsupported`. This is the default of `Context.over` before there is a step to run it in."""
    raise LuthierError("part-unsupported", "context.over may be used from Loss.begin on", where="context.over",
                       remedy="Call it in the loss's begin(context).")  # fmt: skip


def refuse_gradients(model: Any, batch: Any) -> None:
    """Raise `part-unsupported`; the default of `Context.differentiate` where the weights have no values."""
    raise LuthierError("part-unsupported", "these weights have no values", where="context.differentiate",
                       remedy="Call it where context.has_values is true, as within context.decide.")  # fmt: skip


def refuse_text(text: str) -> list[int]:
    """Raise `part-unsupported`; the default of `Context.encode` where no tokenizer is at hand."""
    raise LuthierError("part-unsupported", "no tokenizer is at hand here", where="context.encode", found=text,
                       remedy="Call it where context.purpose is train.")  # fmt: skip


def compute_uncached(key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return `compute()`. This is the default of `Context.cache` where no folder keeps tensors."""
    return compute()


@attrs.frozen(kw_only=True)
class Context:
    """A view of the run that a part gets in `attach`, `apply`, `merge` and `begin`.

    What it says:

    - `purpose`: why the part is called. "plan": to predict memory, on fake tensors; nothing is trained. "hollow": on a
      rank whose weights are on torch's meta device until rank 0 sends them. "train": to train. "open": to save, merge
      or generate, on a whole model.
    - `has_values`: False if the weights are fake or on meta. No number may be read from them then.
    - `config`: the transformers config of the model. `device` and `dtype`: those of its weights.
    - `seed`: the seed of the run. Torch's generators are seeded from it before `attach`.
    - `total_steps`: the number of optimizer steps, None if it is not known.
    - `dropout`: False if the loss is to see no dropout that the recipe does not ask for. A rate that an adapter has by
      default is then 0.
    - `task_index` of `num_tasks`: the task of a sequence that the run trains, from 0, as `begin_task` is told. `attach`
      makes room for what the task needs, because sharded parameters keep their shapes.

    What it does:

    - `log(name, value)` adds a number to the metrics of the current step.
    - `dequantize(layer)` returns the weight of a layer, quantized or not, [out, in] float32.
    - `requantize(layer, weight)` writes such a weight into the layer.
    - `original(layer)` reads the unquantized weight of a layer from the checkpoint, [out, in] float32. It raises
      `LuthierError` if there is no checkpoint.
    - `batches(n)` returns the first n packed batches of the training data, or all if there are fewer.
    - `over(batches, function)` calls `function(policy, batch)` for each batch, without gradient or dropout, and returns
      the results of all ranks in the order of the batches. A result is a tree of tensors and JSON values. Every rank
      makes equally many calls. It may be used from `Loss.begin` on. A plan calls the function for the first batch only.
    - `forward(model, batch)` runs the model without its head over a packed batch, without gradient or dropout, and
      returns the last hidden states [T, H]. It may be used before the adapter is attached, and calls hooks on layers.
    - `differentiate(model, batch)` computes the gradient of minus the log-likelihood of a packed batch's labels,
      weighted as in training and without dropout, at the outputs of all layers. Hooks on layers see it; no parameter
      gets a gradient. It may be used before the adapter is attached, and requires values.
    - `encode(text)` returns the token ids of a text, without special tokens. It raises `LuthierError` when an artifact
      is opened.
    - `decide(name, function, bound=None)` calls `function()` on rank 0, and returns its JSON value on every rank. The
      value is kept: it is the same after a resume, and what adapter and quantizer decide also in later tasks and when
      the artifact is opened. Every rank must call it in the same order, even if its weights have no values. In a plan
      it returns `bound`.
    - `progress(total, text)` returns a function `advance(n=1)` that moves a progress bar.
    - `cache(key, compute)` returns the tensors of `compute()`, and keeps them on disk under a hash of `key`. The key
      must name everything that the result depends on, such as the hash of a weight and the options.
    - `probe(model)` checks that packed documents give the same outputs as separate ones. It returns why they differ, or
      None if they do not.
    - `save_model(model, folder)` writes a model in transformers' layout, in the run's `save_dtype` and shard size. If
      its quantized layers are trained, the quantizer writes it.
    - `load_model(folder, model)` returns the model that `save_model` wrote. `model` has the same shape, and may be
      filled.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype
    seed: int
    total_steps: int | None
    dropout: bool = True
    task_index: int = 0
    num_tasks: int = 1
    purpose: Purpose = "train"
    has_values: bool = True
    log: Callable[[str, float], None]
    dequantize: Callable[[nn.Module], Tensor]
    requantize: Callable[[nn.Module, Tensor], None]
    original: Callable[[nn.Module], Tensor]
    batches: Callable[[int], Iterable[Any]]
    over: Callable[[Iterable[Any], Callable[[Any, Any], Any]], list[Any]] = refuse_over
    forward: Callable[[Any, Any], Tensor]
    differentiate: Callable[[Any, Any], None] = refuse_gradients
    encode: Callable[[str], list[int]] = refuse_text
    decide: Callable[..., Any] = lambda name, function, bound=None: function()
    progress: Callable[[int, str], Callable[..., None]] = lambda total, text: lambda n=1: None
    cache: Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]] = compute_uncached
    probe: Callable[..., str | None] = lambda model, packing=True: None
    save_model: Callable[[Any, Path], None] = lambda model, folder: model.save_pretrained(folder)
    load_model: Callable[[Path, Any], Any] = lambda folder, model: type(model).from_pretrained(folder)


@dataclasses.dataclass(frozen=True, kw_only=True)  # DDP looks for tensors inside dataclasses, not inside other classes
class LossOutput:
    """What a loss returns: sums, never means.

    `sums` maps each term to a scalar with gradient. `metrics` maps each name to (sum, count) without gradient; all sums
    over all counts is what is logged.
    """

    sums: dict[str, Tensor]
    metrics: Mapping[str, tuple[float | Tensor, float | Tensor]] = dataclasses.field(default_factory=dict)


@attrs.frozen(kw_only=True, eq=False)
class TokenStatistics:
    """The S supervised tokens of one micro-batch, as a metric over tokens sees them: [S] each, without gradient.

    `top1` is 1 where the label is the most likely token, else 0; `entropy` is in nats. Both are None unless the
    record's `wants` names them.
    """

    labels: Tensor
    logprobs: Tensor
    weights: Tensor
    entropy: Tensor | None = None
    top1: Tensor | None = None


@attrs.frozen(kw_only=True)
class EngineQuestion:
    """A prompt that an engine continues: its tokens, and the `text` that the tokenizer makes them of.

    `text` is None where no text gives exactly these tokens. The answer has at most `max_tokens` tokens and ends before
    the first of `stop_tokens`. At a `temperature` of 0 it is made of the likeliest tokens; else they are drawn, by the
    `seed` (below 2^63) if the engine can.
    """

    prompt: tuple[int, ...]
    text: str | None = None
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()


@attrs.frozen(kw_only=True)
class BenchmarkScore:
    """A number of one task: its `metric`, the `stderr` of its mean (None: not known), over `samples` examples.

    `greater_is_better` is True or False; None: neither direction is better.
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    samples: int
    greater_is_better: bool | None = True
