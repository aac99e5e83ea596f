"""The context that parts get: what they may know of the run they join."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, cast

import attrs
import torch
from torch import Tensor, nn

from luthier.model.load import read_model
from luthier.model.self_check import find_disagreement
from luthier.model.weights.dense_files import Files, save_model
from luthier.model.weights.quantized import write_trained
from luthier.plugins.contracts.protocols import Adapter, Quantizer
from luthier.plugins.contracts.values import Context, Purpose, refuse_text
from luthier.precision import weight_dtypes as storage
from luthier.randomness import seed_all
from luthier.runs.writing.decisions import Decisions
from luthier.step.preparation import cache_tensors, decide_with, differentiate_body, run_body, show_progress

WHOLE: Final = ("train", "open")  # purposes for which the model's weights have values
ATTACHING: Final = -1  # replaces the step number in the random key, so that no step draws the same numbers


@attrs.frozen(kw_only=True)
class ContextSources:
    """The sources of a context besides model and quantizer; `original` reads a layer's unquantized weight."""

    seed: int
    purpose: Purpose = "train"
    total_steps: int | None = 0
    original: Callable[[nn.Module], Tensor]
    batches: Callable[[int], Iterable[Any]] = lambda _: ()
    log: Callable[[str, float], None] = lambda *_: None
    files: Callable[[], Files] = Files
    decisions: Decisions = attrs.field(factory=Decisions)
    encode: Callable[[str], list[int]] = refuse_text


def context_for(model: Any, quantizer: Quantizer, sources: ContextSources) -> Context:
    """Return what parts may know of a run with this model."""
    purpose = sources.purpose
    context = Context(
        config=model.config,
        device=model.device,
        purpose=purpose,
        has_values=purpose in WHOLE,
        dtype=model.dtype,
        seed=sources.seed,
        total_steps=sources.total_steps,
        log=sources.log,
        dequantize=lambda layer: dense_weight(layer, quantizer),
        requantize=lambda layer, weight: _put(layer, weight, quantizer),
        original=sources.original,
        batches=sources.batches,
        forward=run_body,
        encode=sources.encode,
    )
    save, load = functools.partial(_save, quantizer, sources.files), functools.partial(_load, quantizer)
    return _with_preparation(attrs.evolve(context, save_model=save, load_model=load), sources.decisions)


def _with_preparation(context: Context, decisions: Decisions) -> Context:
    context = attrs.evolve(context, decide=decide_with(decisions, context.purpose))
    if not context.has_values:
        return context
    return attrs.evolve(context, progress=show_progress, cache=cache_tensors, probe=find_disagreement,
                        differentiate=differentiate_body)  # fmt: skip


def encode_with(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return a context's `encode`; None: there is no tokenizer."""
    if tokenizer is None:
        return refuse_text
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def attach_adapter(adapter: Adapter, model: Any, context: Context) -> Any:
    """Return the model with its adapter. What the adapter draws follows from the run's seed, in every world alike."""
    seed_all(context.seed, ATTACHING)
    return adapter.attach(model, context)


def _save(quantizer: Quantizer, files: Callable[[], Files], model: Any, folder: Path) -> None:
    if quantizer.trains:
        write_trained(model, folder, quantizer)
    else:
        save_model(model, folder, files())


def _load(quantizer: Quantizer, folder: Path, model: Any) -> Any:
    return quantizer.load(folder, model) if quantizer.trains else read_model(folder, model.dtype)


def dense_weight(layer: nn.Module, quantizer: Quantizer) -> Tensor:
    """Return a layer's weight [out, in] in float32, in whatever form the layer stores it."""
    weight_held = quantizer.dequantize(layer)
    if weight_held is not None:
        return weight_held
    weight = storage.whole_weight(cast(Tensor, layer.weight))
    return (weight.T if _transposed(layer) else weight).to(torch.promote_types(torch.float32, weight.dtype))


def _put(layer: Any, weight: Tensor, quantizer: Quantizer) -> None:
    if quantizer.dequantize(layer) is not None:
        quantizer.requantize(layer, weight)
        return
    storage.fill_parameter(layer.weight, weight.T if _transposed(layer) else weight)


def _transposed(layer: nn.Module) -> bool:
    """transformers' Conv1D holds [in, out]."""
    return type(layer).__name__ == "Conv1D"
