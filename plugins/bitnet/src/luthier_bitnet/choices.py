"""The choice that tuning makes for a layer, and the layer that keeps it."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor, nn


@attrs.frozen(kw_only=True)
class Choice:
    """The choice of one layer: the factor of its range or threshold, and its own number of bits (0: all layers')."""

    factor: float = 1.0
    bits: float = 0.0

    @classmethod
    def of(cls, chosen: Tensor) -> Choice:
        """Return the choice that a tensor [2] of a layer stands for: the factor, and 100 times the bits."""
        return cls(factor=float(chosen[0]), bits=round(float(chosen[1])) / 100)


class ChoosingLayer(nn.Module):
    """A layer of which tuning may change how it rounds. What was chosen is in its state dict, if it was ever tuned."""

    weight: nn.Parameter
    chosen: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.choice = Choice()  # what `chosen` holds
        self.register_buffer("chosen", None)

    @property
    def levels_bits(self) -> float:
        """Return the bits of this layer's weights: those of -s, 0 and s, unless a subclass has other levels."""
        return 1.58

    def allow_choice(self) -> None:
        """Keep a choice in the state dict from here on."""
        if self.chosen is None:
            self.chosen = torch.tensor([1.0, 0.0], device=self.weight.device)

    def choose(self, choice: Choice) -> None:
        """Take another factor, or other bits, as float32 holds them."""
        self.chosen = torch.tensor([choice.factor, 100 * choice.bits], device=self.weight.device)
        self.choice = Choice.of(self.chosen)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        if f"{prefix}chosen" in state_dict:  # of an earlier run with tuning, even if this one has none
            self.allow_choice()
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if self.chosen is not None and not self.chosen.is_meta:
            self.choice = Choice.of(self.chosen)
