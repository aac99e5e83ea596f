"""The head and the loss alone, forward and backward, against TRL's chunked path and against all logits at once.

Both sides get the same hidden states, weight and labels, as supervised fine-tuning has them. TRL scores every position on
a CPU, and gives its three statistics as its trainer asks for them; ours scores the supervised ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tests.speed.sides import median
from tests.speed.table import Row

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 3
TRL_COLUMNS = 32768  # as its trainers have it
TRL_WANTS = ("log_probs", "entropy", "is_top1")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", choices=("trl", "eager"), default="trl")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    for trains in (False, True):
        for share in (1.0, 0.5):
            yield _row(arguments, trains, share)


def _row(arguments: argparse.Namespace, trains: bool, share: float) -> Row:
    """One head, frozen or not, with `share` of the labels supervised."""
    work = Work(arguments, trains, share)
    theirs = work.trl if arguments.peer == "trl" else work.eager
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    losses = {}
    for _ in range(arguments.rounds or ROUNDS):
        losses["ours"] = _timed(seconds["ours"], work.ours, arguments.clock)
        losses["peer"] = _timed(seconds["peer"], theirs, arguments.clock)
    shape = f"{arguments.tokens}x{arguments.hidden}x{arguments.vocabulary}"
    case = f"head {arguments.dtype} {shape} {'trained' if trains else 'frozen'}, {share:.0%} supervised"
    mine, other = (median(seconds[side]) * 1e3 for side in ("ours", "peer"))
    more = {"peak_ours_mb": work.peak(work.ours), "peak_peer_mb": work.peak(theirs), "products_ms": work.products()}
    difference = losses["ours"] - losses["peer"]
    return Row.cost(case, mine, other, "ms", loss_difference=difference, more=more)


class Work:
    """The same loss, the mean of -log p over the supervised labels, by each side; returns its value."""

    def __init__(self, arguments: argparse.Namespace, trains: bool, share: float) -> None:
        import torch

        torch.manual_seed(0)
        dtype = getattr(torch, arguments.dtype)
        tokens, hidden, vocabulary = arguments.tokens, arguments.hidden, arguments.vocabulary
        self.clock, self.trains = arguments.clock, trains
        self.rows = torch.randn(tokens, hidden).to(dtype).requires_grad_()
        self.layer = torch.nn.Linear(hidden, vocabulary, bias=False, dtype=dtype).requires_grad_(trains)
        self.weight = self.layer.weight
        self.labels = torch.randint(0, vocabulary, (tokens,))
        self.counted = torch.zeros(tokens, dtype=torch.bool)
        self.counted[tokens - int(tokens * share) :] = True  # a prompt, then its answer
        self.places = self.counted.nonzero().squeeze(1)

    def ours(self) -> float:
        import torch
        from luthier.model.head.direct import InForward, OnePass
        from luthier.model.head.recognise_head import linear_head
        from luthier.model.head.tiles import Curve

        rows, labels = self.rows.index_select(0, self.places), self.labels[self.places]
        head = linear_head(self.layer, Curve())
        if self.trains:
            told = torch.full((len(labels),), -1.0)
            logprobs = InForward.apply(rows, self.weight, None, head, labels, ("top1",), told)[0]
        else:
            logprobs = OnePass.apply(rows, head, labels, ("top1",))[0]
        return self._backward(-logprobs.sum() / len(labels))

    def trl(self) -> float:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        settings = (None, self.labels, 1.0, TRL_COLUMNS, None, 1.0, TRL_WANTS)
        logprobs = ChunkedLogProbFunction.apply(self.rows, self.weight, *settings)[0]
        return self._backward(-logprobs.masked_fill(~self.counted, 0).sum() / len(self.places))

    def eager(self) -> float:
        from torch.nn.functional import cross_entropy

        logits = (self.rows @ self.weight.t()).float()
        return self._backward(cross_entropy(logits.masked_select(self.counted[:, None]).view(-1, logits.shape[1]),
                                            self.labels[self.counted]))  # fmt: skip

    def _backward(self, loss: Tensor) -> float:
        loss.backward()
        self.rows.grad = self.weight.grad = None
        return float(loss.detach())

    def peak(self, side: Callable[[], float]) -> float:
        """MB that torch's allocator gave at the most, the gradients included."""
        from luthier.hardware.memory_meter import Allocations

        with Allocations() as held:
            side()
        return held.peak / 2**20

    def products(self) -> float:
        """Milliseconds of the matrix products that cannot be saved: two, three where the head trains."""
        import torch
        from luthier.hardware.low_precision import imitates_dtype

        dtype = torch.float32 if imitates_dtype(self.weight.device, self.weight.dtype) else self.weight.dtype
        rows, weight = (t.detach().to(dtype) for t in (self.rows[self.places], self.weight))
        spent: list[float] = []
        for _ in range(3):
            logits = rows @ weight.t()
            _timed(spent, lambda: rows @ weight.t(), self.clock)
            _timed(spent, lambda logits=logits: logits @ weight, self.clock)
        return (3 if self.trains else 2) * min(spent) * 1e3


def _timed(into: list[float], work: Callable[[], Any], clock: str) -> Any:
    now = time.process_time if clock == "cpu" else time.perf_counter
    began = now()
    result = work()
    into.append(now() - began)
    return result
