"""The function that is traced, and the inputs that it is traced and compared with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

OUTPUT: Final = "logits"


class Traced(nn.Module):
    """A causal language model as a function of its inputs alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.names = model, input_names(model)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return logits [batch, tokens, vocabulary] for the inputs of `input_names`, each [batch, tokens]."""
        named = dict(zip(self.names, inputs, strict=True))
        logits: Tensor = self.model(**named, use_cache=False).logits
        return logits


def input_names(model: Any) -> tuple[str, ...]:
    """Return the inputs: ids, mask, and positions if the model takes them."""
    positions = "position_ids" in inspect.signature(model.forward).parameters
    return ("input_ids", "attention_mask", *(("position_ids",) if positions else ()))


def draw_inputs(model: Any, lengths: Sequence[int]) -> dict[str, Tensor]:
    """Return inputs of drawn tokens by name, one row for each length, padded on the left; int64 [rows, longest]."""
    random, longest = torch.Generator().manual_seed(0), max(lengths)
    ids = torch.randint(model.config.get_text_config().vocab_size, (len(lengths), longest), generator=random)
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths])
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    made = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    return {name: made[name] for name in input_names(model)}
