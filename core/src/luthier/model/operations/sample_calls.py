"""A small part of a call, on which an operation is compared: all logits of a batch in float64 would fill the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

ROWS: Final = 64  # tokens that are compared
WIDEST: Final = 4096  # outputs of a layer, or tokens of a vocabulary


def sample_call(operation: str, given: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments for the first tokens, of which they are many; attention is left whole.

    A head is cut to the labels' own rows of the vocabulary and to its first ones.
    """
    return _SAMPLED.get(operation, tuple)(given)


def _sample_rows(given: Sequence[Any]) -> tuple[Any, ...]:
    """Every tensor but a weight [H] has its tokens in the dimension before the last."""
    return tuple(_first_rows(a) if isinstance(a, Tensor) else a for a in given)


def _sample_linear(given: Sequence[Any]) -> tuple[Any, ...]:
    x, weight, bias = given
    return _first_rows(x), weight[:WIDEST], None if bias is None else bias[:WIDEST]


def _sample_head(given: Sequence[Any]) -> tuple[Any, ...]:
    states, weight, bias, labels, *rest = given
    labels = labels[:ROWS]
    first = torch.arange(min(len(weight), WIDEST), device=labels.device)
    kept = torch.unique(torch.cat([labels, first]))  # sorted
    cut = None if bias is None else bias[kept]
    return (states[:ROWS], weight[kept], cut, torch.searchsorted(kept, labels), *rest)


def _first_rows(x: Tensor) -> Tensor:
    return x[..., :ROWS, :] if x.dim() > 1 else x


_SAMPLED: Final[dict[str, Callable[[Sequence[Any]], tuple[Any, ...]]]] = {
    "rms_norm": _sample_rows,
    "add_rms_norm": _sample_rows,
    "rope": _sample_rows,
    "swiglu": _sample_rows,
    "geglu": _sample_rows,
    "linear": _sample_linear,
    "token_logprobs": _sample_head,
}
