"""Saving of what a run has trained: the adapter alone, or a merged model that plain transformers loads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import attrs
from torch import nn

from luthier.artifacts.dense_copy import Weigh, check_kept, make_dense
from luthier.artifacts.folders import write_artifact
from luthier.artifacts.verify import check_adapter, check_model, check_trained, measure_error
from luthier.logs import get_logger
from luthier.model.attention import ordinary_attention
from luthier.model.load import quiet
from luthier.model.weights.dense_files import Files, save_model
from luthier.model.weights.quantized import QUANTIZED
from luthier.plugins.contracts.protocols import Adapter, Quantizer
from luthier.recipe.checks.soundness import unmergeable_part

log = get_logger()


def artifact_name(adapter: Adapter) -> str:
    """Return the folder that an adapter's `save` fills: `adapter`, or `model` for one that is a whole model."""
    return getattr(adapter, "artifact", "adapter")


def save_adapter(
    model: Any, tokenizer: Any, adapter: Adapter, folder: Path, note: dict[str, Any], quantizer: Any = None
) -> Path:
    """Save the adapter and the tokenizer, check them by reading them back, and return the folder."""
    is_model = artifact_name(adapter) == "model"
    is_trained = is_model and quantizer is not None and quantizer.trains
    if not all(getattr(part, "mergeable", True) for part in (adapter, quantizer)):  # which attaching may have shown
        note = {**note, "mergeable": False}

    def write(aside: Path) -> None:
        with portable_model(model):
            adapter.save(aside)
        tokenizer.save_pretrained(aside)
        if is_trained:
            check_trained(model, aside, note, quantizer)
        elif is_model:
            check_model(model, aside, adapter)
        else:
            check_adapter(model, adapter, aside, note)

    return write_artifact(folder, write, {**note, "artifact": QUANTIZED if is_trained else artifact_name(adapter)})


@attrs.frozen(kw_only=True)
class MergeBase:
    """The weights of quantized layers to which an update is added.

    `onto` is what the layers compute (dequantized), what the checkpoint holds (original), which `original` reads, or
    `plain` if no layer is quantized. With `original` given, the errors of both choices are measured.
    """

    onto: Literal["plain", "dequantized", "original"] = "plain"
    original: Weigh | None = None

    @property
    def reader(self) -> Weigh | None:
        """Return the reader of the weights that the update is added to; None means the quantizer's own."""
        return self.original if self.onto == "original" else None

    def others(self) -> dict[str, Weigh | None]:
        """Return the reader of the other choice by its name, if both are measured."""
        if self.original is None:
            return {}
        return {"dequantized": None} if self.onto == "original" else {"original": self.original}


def save_merged(
    model: Any, tokenizer: Any, adapter: Adapter, quantizer: Quantizer, folder: Path, note: dict[str, Any],
    base: MergeBase | None = None,
) -> Path:  # fmt: skip
    """Save a dense model in plain transformers' layout, check it by loading it there, and return the folder.

    The live model stays unchanged. `adapter` None means that there is none. The errors of the merge are in the folder's
    note, under `merge`. Raises `artifact-unmergeable` if a part cannot be merged, or rounding would erase the update.
    """
    base = base or MergeBase(onto="dequantized" if is_quantized(model, quantizer) else "plain")
    check_mergeable(adapter, quantizer, note)
    dtype = Files.of_note(note).dtype or model.dtype
    merge_note: dict[str, Any] = {"onto": base.onto, "dtype": str(dtype).removeprefix("torch."), "errors": {}}
    dense_of = functools.partial(make_dense, model, adapter, quantizer)

    def write(aside: Path) -> None:
        for onto, read in base.others().items():
            merge_note["errors"][onto] = measure_error(model, dense_of(read).model.to(dtype).to(model.dtype), adapter)
        dense = dense_of(base.reader)
        merge_note["kept"] = check_kept(dense, dtype)
        dense.round_weights(dtype)
        with portable_model(dense.model):
            save_model(dense.model, aside, Files.of_note(note))
        tokenizer.save_pretrained(aside)
        live, part = (model, adapter) if base.reader is None else (dense.model.to(model.dtype), None)
        error = check_model(live, aside, part)
        merge_note["errors"][base.onto] = error if base.reader is None else measure_error(model, live, adapter)
        log.info("merged", **merge_note)

    return write_artifact(folder, write, {**note, "artifact": "model", "merge": merge_note})


def is_quantized(model: nn.Module, quantizer: Quantizer | None) -> bool:
    """Return True if layers of a model hold weights in their quantizer's form."""
    return quantizer is not None and any(quantizer.dequantize(layer) is not None for layer in model.modules())


def check_mergeable(adapter: Any, quantizer: Any, note: dict[str, Any]) -> None:
    """Raise `artifact-unmergeable` if the record of a part says that it cannot be merged."""
    for kind, part in (("adapter", adapter), ("quantizer", quantizer)):
        if not getattr(part, "mergeable", True):
            raise unmergeable_part(kind, note[kind].get("name", type(part).__name__))


@contextmanager
def portable_model(model: Any) -> Iterator[None]:
    """Give the model, within this context, an attention that every machine has, and show no progress bar."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ordinary_attention(model))
    try:
        with quiet():
            yield
    finally:
        model.set_attn_implementation(before)
