"""A small part of a call, on which an operation is compared: all logits of a batch in float64 would fill the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

ROWS: Final = 256  # tokens in a comparison: several tiles of a kernel
HEAD_ROWS: Final = 128  # tokens of a head, each of which has a row of logits
OUTPUTS: Final = 4096  # outputs of a layer
ATTENDED: Final = 128  # tokens of attention, whose reference forms all scores
KEY_HEADS: Final = 2  # heads of keys, with the heads of queries that share them
WORDS: Final = 8192 + 512  # columns of a vocabulary: more than a tile of 8192
STEP: Final = 128  # a cut size keeps its remainder, so that kernels for multiples of 2 to 128 accept the cut call


def sample_call(operation: str, given: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments for the first tokens, of which they are many; attention is cut to the first heads, too.

    A head is cut to the labels' own rows of the vocabulary and to its first ones. Whichever size is cut, what remains
    has the remainder by 128 that the whole has.
    """
    return _SAMPLED.get(operation, tuple)(given)


def cut_size(size: int, limit: int) -> int:
    """Return a size of at least `limit`, less than 128 above it, with the remainder of `size`; `size` if that is less.

    A plain minimum would give shapes that no predicate was asked about.
    """
    return min(size, limit + (size - limit) % STEP)


def _sample_rows(given: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_first_rows(a, ROWS) if isinstance(a, Tensor) else a for a in given)


def _sample_linear(given: Sequence[Any]) -> tuple[Any, ...]:
    x, weight, bias = given
    outputs = cut_size(len(weight), OUTPUTS)
    return _first_rows(x, ROWS), weight[:outputs], None if bias is None else bias[:outputs]


def _sample_head(given: Sequence[Any]) -> tuple[Any, ...]:
    states, weight, bias, labels, *rest = given
    rows = cut_size(len(states), HEAD_ROWS)
    labels = labels[:rows]
    others = torch.ones(len(weight), dtype=torch.bool, device=labels.device)
    others[labels] = False
    own = torch.unique(labels)
    count = cut_size(len(weight), WORDS)
    token_ids = torch.cat([own, others.nonzero().squeeze(1)[: count - len(own)]]).sort().values
    cut = None if bias is None else bias[token_ids]
    return (states[:rows], weight[token_ids], cut, torch.searchsorted(token_ids, labels), *rest)


def _sample_attention(given: Sequence[Any]) -> tuple[Any, ...]:
    query, key, value, starts, continues, *rest = given
    tokens = cut_size(query.shape[2], ATTENDED)
    keys = min(key.shape[1], KEY_HEADS)
    heads, known = query.shape[1] // key.shape[1] * keys, key.shape[2] - query.shape[2] + tokens
    cut = torch.cat([starts[starts < tokens], starts.new_tensor([tokens])])
    links = None if continues is None else continues[: len(cut) - 1]
    return (query[:, :heads, :tokens], key[:, :keys, :known], value[:, :keys, :known], cut, links, *rest)


def _first_rows(x: Tensor, limit: int) -> Tensor:
    """Cut every dimension but the last: tokens stand in the second of [B, T, heads, D], in the third elsewhere."""
    for place in range(x.dim() - 1):
        x = x.narrow(place, 0, cut_size(x.shape[place], limit))
    return x


_SAMPLED: Final[dict[str, Callable[[Sequence[Any]], tuple[Any, ...]]]] = {
    "rms_norm": _sample_rows,
    "add_rms_norm": _sample_rows,
    "rope": _sample_rows,
    "swiglu": _sample_rows,
    "geglu": _sample_rows,
    "linear": _sample_linear,
    "token_logprobs": _sample_head,
    "document_attention": _sample_attention,
}
