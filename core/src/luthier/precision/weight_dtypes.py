"""Storage: the dtype that a model's weights are held in while it trains, put back afterwards to the bit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from luthier.precision.bf16_steps import put_tensor
from luthier.precision.rounding import cut_pieces, join_halves, split_halves

# modules of these packages keep plain weights
PLAIN: Final = ("torch.nn.modules.", "transformers.models.", "transformers.pytorch_utils")
FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)


@attrs.define(kw_only=True, eq=False)
class Held:
    """One frozen weight in another dtype than it came in, and what it takes to give it back: nothing where it is exact.

    `rest` is what bfloat16 cut off, in int16; or, where the dtype is float16, the whole weight. It lies on the host.
    """

    parameter: nn.Parameter
    came: torch.dtype
    rest: Tensor | None = None

    def whole(self) -> Tensor:
        """Return the weight as it was loaded, on its device."""
        now = self.parameter.detach()
        if self.rest is None:
            return now.to(self.came)
        if self.rest.is_floating_point():
            return self.rest.to(now.device)
        return join_halves(now, self.rest).to(self.came)

    def fill(self, weight: Tensor) -> None:
        """Take another weight in its place, with nothing lost of it."""
        low, self.rest = _lowered(weight.to(self.came), self.parameter.dtype)
        self.parameter.detach().copy_(low)

    def restore(self) -> None:
        put_tensor(self.parameter, self.whole())
        del self.parameter.held  # type: ignore[attr-defined]


def hold_weight(parameter: nn.Parameter, dtype: torch.dtype, *, exact: bool = False) -> Held:
    """Let a frozen weight be of `dtype` from now on; `exact`: nothing of it is lost, or nobody will ask for it."""
    holder, weight = Held(parameter=parameter, came=parameter.dtype), parameter.detach()
    low, holder.rest = (weight.to(dtype), None) if exact else _lowered(weight, dtype)
    put_tensor(parameter, low)
    parameter.held = holder  # type: ignore[attr-defined]  # where `whole_weight` and `fill_parameter` find it
    return holder


def whole_weight(parameter: Tensor) -> Tensor:
    """Return a weight as it was loaded, wherever it is stored."""
    holder = getattr(parameter, "held", None)
    return parameter.detach() if holder is None else holder.whole()


def wide_weight(parameter: Tensor) -> Tensor | None:
    """Return a weight with all its bits; None if it has no more than 16, or if some lie on another device."""
    holder = getattr(parameter, "held", None)
    if holder is None:
        return parameter.detach() if parameter.element_size() > 2 else None
    near = holder.rest is not None and holder.rest.device == parameter.device
    return holder.whole() if near else None


@torch.no_grad()
def fill_parameter(parameter: Tensor, weight: Tensor) -> None:
    """Copy a weight into a parameter, held or not."""
    holder = getattr(parameter, "held", None)
    if holder is None:
        parameter.copy_(weight)
    else:
        holder.fill(weight)


def _lowered(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return the weight in `dtype`, and, in host memory, what it has lost."""
    if dtype is torch.bfloat16:
        low, rest = split_halves(weight.float())
        return low, None if rest is None else rest.cpu()
    low = weight.to(dtype)
    return low, None if bool((low.to(weight.dtype) == weight).all()) else weight.cpu()


def frozen_weights(model: Any, dtype: torch.dtype) -> Iterator[nn.Parameter]:
    """Yield the frozen weights of torch's and transformers' own layers that are not of `dtype`, each once.

    Left as they are: what a quantizer or an adapter brought, what the architecture says must stay in float32, and
    weights that are not finite, which the trace shall find.
    """
    wide = _stays_wide(model, dtype)
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not type(module).__module__.startswith(PLAIN) or wide(path):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad or id(parameter) in seen or parameter.dtype not in FLOATS:
                continue
            seen.add(id(parameter))
            if parameter.dtype is not dtype and _is_finite(parameter.detach()):
                yield parameter


def _is_finite(weight: Tensor) -> bool:
    """Return True if each number is; a tensor without data has no other."""
    return weight.is_meta or not any(bool((~piece.isfinite()).any()) for piece in cut_pieces(weight))


def _stays_wide(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """transformers' own lists of modules that are kept in float32, some of them for float16 only."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    pattern = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in sorted(names)) or r"(?!)")
    return lambda path: dtype is not torch.float32 and pattern.search(path) is not None
