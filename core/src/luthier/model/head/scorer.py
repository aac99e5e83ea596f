"""The scorer: which way label log-probabilities are computed and differentiated, chosen by what trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from luthier.logs import get_logger
from luthier.model.head.direct import InForward, OnePass, Recompute, Scores, score_labels
from luthier.model.head.own_head import Head, OwnPass, head_trains, score_chunks
from luthier.model.head.recognise_head import fit_curve, head_obstacle, linear_head
from luthier.model.head.tiles import Curve, Linear, cut_blocks
from luthier.model.operations.signatures import active_operations

log = get_logger()

CHUNK: Final = 2**22  # logits of the model's own head in memory at once, 16 MiB in float32
Coefficients = Callable[[], "Tensor | None"]  # returns [S]


class Scorer:
    """Label log-probabilities of one model's head. `own` calls the head as the model does."""

    def __init__(self, model: Any, body: nn.Module, own: Head) -> None:
        self.model, self.body, self.own = model, body, own
        self._curve: Curve | None = None
        self._refused: str | None = None
        self._seen: Any = None  # the head that was compared
        self._said: set[tuple[str, str]] = set()

    def scores(self, rows: Tensor, labels: Tensor, want: tuple[str, ...], coefficients: Coefficients) -> Scores:
        """Return [S] each for rows [S, H]; differentiable where autograd is on and something trains."""
        head = self._linear()
        if head is None:
            return self._by_own(rows, labels, want)
        offered = NotImplemented if want else self._offered(head, rows, labels)
        if offered is not NotImplemented:
            return offered, None, None
        weight, bias = head.weight, head.bias
        train = weight.requires_grad or (bias is not None and bias.requires_grad)
        if not (torch.is_grad_enabled() and (train or rows.requires_grad)):
            return score_labels(head, rows, labels, want)
        if not train:
            self._say("one-pass", "the head is frozen")
            return OnePass.apply(rows, head, labels, want)
        known = None if "entropy" in want else coefficients()
        if known is None:
            why = "an entropy is asked for" if "entropy" in want else "the loss declares no coefficients"
            self._say("recompute", f"the head trains, and {why}")
            return Recompute.apply(rows, weight, bias, head, labels, want)
        self._say("gradient in forward", "the head trains, and the loss declares its coefficients")
        return InForward.apply(rows, weight, bias, head, labels, want, known.to(head.exact))

    def _offered(self, head: Linear, rows: Tensor, labels: Tensor) -> Any:
        """By the form that a plugin offers; NotImplemented where there is none for this call."""
        operations = active_operations(self.model)
        if not operations.has_offers("token_logprobs"):
            return NotImplemented
        lowered = [None if t is None else t.to(head.dtype) for t in (rows, head.weight, head.bias)]
        return operations.compute_offered("token_logprobs", *lowered, labels, head.curve.scale, head.curve.cap)

    def _by_own(self, rows: Tensor, labels: Tensor, want: tuple[str, ...]) -> Scores:
        """Through the model's own call of its head."""
        spans = cut_blocks(len(labels), max(1, CHUNK // self.model.config.get_text_config().vocab_size))
        reason = f"the model calls it itself: {self._refused}"
        if not torch.is_grad_enabled():
            columns = score_chunks(self.own, rows, labels, want, spans)
        elif "entropy" in want or head_trains(self.own, rows):
            self._say("recompute", f"it trains or an entropy is asked for; {reason}")
            columns = score_chunks(self.own, rows, labels, want, spans)
        else:
            self._say("one-pass", f"it is frozen; {reason}")
            columns = OwnPass.apply(rows, self.own, labels, want, spans)
        also = {name: columns[:, i + 1] for i, name in enumerate(want)}
        return columns[:, 0], also.get("entropy"), also["top1"].detach() if "top1" in also else None

    def _linear(self) -> Linear | None:
        """Return the head as a linear layer, None if it is not. It is compared once with the model's own call."""
        self._refused = head_obstacle(self.model, self.body)
        if self._refused is not None:
            return None
        head = self.model.get_output_embeddings()
        if head is not self._seen:
            self._seen, self._curve = head, fit_curve(self.model, self.own)
        if self._curve is None:
            self._refused = "its logits are not those of a linear layer"
            return None
        return linear_head(head, self._curve)

    def _say(self, form: str, reason: str) -> None:
        if (form, reason) not in self._said:
            self._said.add((form, reason))
            log.debug("head", form=form, reason=reason)
