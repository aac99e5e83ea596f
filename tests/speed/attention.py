"""Attention over packed documents, forward and backward, against what transformers does with a packed row.

Peers: `mask`, scaled dot product with the block-diagonal mask that transformers builds from packed position ids; `loop`,
torch's own kernel for each document.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tests.speed.sides import median
from tests.speed.table import Row

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 5
TOKENS = 2048
DOCUMENTS = {
    "6 of 341": [341] * 5 + [343],
    "12 of 100 to 250": [100, 150, 200, 250, 120, 180, 130, 170, 140, 190, 210, 208],
    "16 of 128": [128] * 16,
    "1 of 2048": [2048],
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", choices=("mask", "loop"), default="mask")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    for dtype in ("bfloat16", "float32"):
        for name, lengths in DOCUMENTS.items():
            yield _row(arguments, dtype, name, lengths)


def _row(arguments: argparse.Namespace, dtype: str, name: str, lengths: list[int]) -> Row:
    work = Work(arguments, dtype, lengths)
    theirs = getattr(work, arguments.peer)
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(arguments.rounds or ROUNDS):
        mine = _timed(seconds["ours"], work.ours, arguments.clock)
        other = _timed(seconds["peer"], theirs, arguments.clock)
    furthest = max(float((a - b).norm() / b.norm()) for a, b in zip(mine, other, strict=True))
    spent = (median(seconds[side]) * 1e3 for side in ("ours", "peer"))
    case = f"attention {dtype} {arguments.heads}x{arguments.head_dim}, documents: {name}"
    return Row.cost(case, *spent, "ms", more={"relative_difference": furthest, "against": arguments.peer})


class Work:
    """Queries, keys and values of one packed row; each side gives its output and its three gradients."""

    def __init__(self, arguments: argparse.Namespace, dtype: str, lengths: list[int]) -> None:
        import torch

        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        heads = (arguments.heads, arguments.key_heads, arguments.key_heads)
        shapes = [(1, TOKENS, h, arguments.head_dim) for h in heads]
        self.inputs = [torch.randn(s).to(kind).transpose(1, 2).requires_grad_() for s in shapes]
        self.given = torch.randn(shapes[0]).to(kind)
        self.lengths, self.grouped = lengths, heads[0] != heads[1]
        self.starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        self.allowed = (document[:, None] == document) & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()

    def ours(self) -> list[Tensor]:
        import torch
        from luthier.model.attention import attend_documents

        return self._backward(attend_documents(torch.nn.Module(), *self.inputs, None, cu_seq_lens_k=self.starts)[0])

    def mask(self) -> list[Tensor]:
        from torch.nn.functional import scaled_dot_product_attention as attention

        found = attention(*self.inputs, attn_mask=self.allowed, enable_gqa=self.grouped)
        return self._backward(found.transpose(1, 2))

    def loop(self) -> list[Tensor]:
        import torch
        from torch.nn.functional import scaled_dot_product_attention as attention

        parts = zip(*(t.split(self.lengths, 2) for t in self.inputs), strict=True)
        found = [attention(*part, is_causal=True, enable_gqa=self.grouped).transpose(1, 2) for part in parts]
        return self._backward(torch.cat(found, 1))

    def _backward(self, found: Tensor) -> list[Tensor]:
        import torch

        gradients = torch.autograd.grad(found, self.inputs, self.given)
        return [t.detach().float() for t in (found, *gradients)]


def _timed(into: list[float], work: Callable[[], Any], clock: str) -> Any:
    now = time.process_time if clock == "cpu" else time.perf_counter
    began = now()
    result = work()
    into.append(now() - began)
    return result
