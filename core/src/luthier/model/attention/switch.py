"""Switching a model's attention: packed while it trains, ordinary while it generates."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from luthier.model.attention.ways import attend_documents

NAME: Final = "luthier"

AttentionInterface.register(NAME, attend_documents)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def install_attention(model: Any) -> str:
    """Give the model packed attention, on its own copy of the config; returns the implementation it had before."""
    before = model.config._attn_implementation
    _own_config(model)
    model.set_attn_implementation(NAME)
    return before


def _own_config(model: Any) -> None:
    """Give the model its own config, because the attention choice is stored there and another model may share it."""
    copies: dict[int, Any] = {}
    fresh = copy.deepcopy(model.config)
    for name, value in vars(model.config).items():
        if hasattr(value, "to_dict"):
            copies[id(value)] = getattr(fresh, name)
    copies[id(model.config)] = fresh
    for module in model.modules():
        own = copies.get(id(getattr(module, "config", None)))
        if own is not None:
            module.config = own


def ordinary_attention(model: Any) -> str:
    """Return the implementation with which the model generates: sdpa, or eager where it has no sdpa."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Let the model be called with packed batches within this context."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def generating_attention(model: Any) -> Iterator[None]:
    """Let the model generate within this context: ordinary attention, evaluation mode, cache on."""
    before, training = model.config._attn_implementation, model.training
    if before == NAME:
        model.set_attn_implementation(ordinary_attention(model))
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if before == NAME:
            model.set_attn_implementation(NAME)
        model.train(training)
