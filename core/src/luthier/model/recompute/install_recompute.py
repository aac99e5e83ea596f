"""Wrapping each decoder layer's forward, on the instance, so that backward runs it again; taken off after the run.

The forward is wrapped, not the call: what hangs on the layer's hooks, such as FSDP2's gathering, runs once. Random
states are those of the first pass, so that dropout is the same. Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from luthier.errors import LuthierError
from luthier.model.attention.document_masks import aside_documents, documents_told
from luthier.model.recompute.offload import CudaWay, HostMemory
from luthier.model.recompute.selective import selective_contexts
from luthier.model.weights.layers import decoder_layers

Mode = bool | Literal["selective", "offload"]
OPTION = "gradient_checkpointing"


def refuse_recompute(mode: Mode, device: torch.device) -> None:
    """Raise `recipe-conflict` where a mode would do nothing on this device."""
    if mode == "offload" and device.type != "cuda":
        problem = f"layer inputs are offloaded from a CUDA device to the host, and on {device.type} they lie there"
        remedy = "Choose true or selective."
        raise LuthierError("recipe-conflict", problem, where=OPTION, found=mode, remedy=remedy)


@contextmanager
def install_recompute(model: Any, mode: Mode) -> Iterator[None]:
    """Recompute the model's decoder layers in backward within this context. Raises `part-unsupported` without any."""
    if mode is False:
        yield
        return
    layers = list(decoder_layers(model))
    if not layers:
        problem = f"no decoder layers were found in {type(model).__name__}"
        raise LuthierError("part-unsupported", problem, where=OPTION, remedy="Set it to false.")
    host = HostMemory(resident=len(layers) - 1, way=CudaWay()) if mode == "offload" else None
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    for number, layer in enumerate(layers):
        layer.forward = _recomputed(layer, mode, host, number)
    try:
        yield
    finally:
        for layer, own in before:
            del layer.forward
            if own is not None:  # the module had an attribute of its own, not the class's
                layer.forward = own


def _recomputed(layer: nn.Module, mode: Mode, host: HostMemory | None, number: int) -> Callable[..., Any]:
    layer_forward = layer.forward
    how: dict[str, Any] = {"context_fn": selective_contexts} if mode == "selective" else {}

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return layer_forward(*args, **kwargs)
        with nullcontext() if host is None else host.saving(number):
            return checkpoint(_told_again(layer_forward), *args, use_reentrant=False, **how, **kwargs)

    return run


def _told_again(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward as it runs now, in backward too: an architecture may pass on nothing of the documents."""
    documents = aside_documents()

    def run(*args: Any, **kwargs: Any) -> Any:
        with documents_told(documents):
            return forward(*args, **kwargs)

    return run
