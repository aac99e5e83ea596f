"""Log-probabilities of labels, computed in tiles of the vocabulary so that all logits never exist at once.

States [S, H], the head's weight [V, H] and bias [V] have one dtype (float32, bfloat16, float16, float64); labels are
[S] int64, and the result is [S] float32 (float64 for float64). For a frozen head the gradient of the states is computed
in the forward pass, while the logits exist, and backward only scales its rows: two matrix products. For a head that
trains, backward computes the logits again: four.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from luthier_kernels.head.tiles import WIDEST, Bend, add_rows, fold_tile, slope_tile
from luthier_kernels.registration import register_operation

ROWS, NARROWEST = 1024, 1024
ELEMENTS = {"cpu": 2**21, "cuda": 2**26}  # of one tile; on a processor 8 MiB in float32, which fit into its caches


def score_labels(
    states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    """Return [S] log p(label), from logits = (states weight^T + bias) * scale, and then cap * tanh(logits / cap).

    Labels are in [0, V). Another label raises IndexError on a processor. On a GPU, where checking labels would wait for
    the device, its log-probability is NaN.
    """
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    ahead = torch.is_grad_enabled() and states.requires_grad and not trains
    return FORWARD(states, weight, bias, labels, float(scale), float(cap or 0.0), ahead)[0]


def reference_score(
    states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    """Compute the same in plain torch from all logits at once, which every implementation must match."""
    logits = torch.nn.functional.linear(states, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def _score(
    states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, cap: float, ahead: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, log-sum-exps, and, if `ahead`, the gradient of the states (else empty)."""
    if labels.device.type == "cpu":
        _check_labels(labels, len(weight))
    exact = torch.promote_types(states.dtype, torch.float32)
    logprobs, norms = (torch.empty(len(states), dtype=exact, device=states.device) for _ in range(2))
    gradient = torch.empty_like(states) if ahead else states.new_empty(0)
    room = _room(states, weight)
    for span in _spans(len(states)):
        rows, own = states[span].contiguous(), labels[span].contiguous()
        block_scores = _score_block(rows, weight, Bend(bias, scale, cap), own, room, ahead)
        logprobs[span], norms[span] = block_scores[:2]
        if ahead:
            gradient[span] = block_scores[2]
    return logprobs, norms, gradient


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    outside = ((labels < 0) | (labels >= vocabulary)).nonzero()
    if len(outside):
        place = int(outside[0])
        raise IndexError(
            f"label {int(labels[place])} at place {place} is outside the vocabulary of {vocabulary} entries"
        )


def _score_block(
    rows: Tensor, weight: Tensor, bend: Bend, labels: Tensor, room: Tensor, ahead: bool
) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.promote_types(rows.dtype, torch.float32)
    label = torch.full((len(rows),), torch.nan, dtype=exact, device=rows.device)  # until a tile has it
    peak, mass = torch.full_like(label, -torch.inf), torch.zeros_like(label)
    total = rows.new_zeros(rows.shape if ahead else (0,), dtype=exact)
    for first, part, tile in _each_tile(rows, weight, room):
        own = bend._replace(bias=None if bend.bias is None else bend.bias[first : first + len(part)])
        high, more = fold_tile(tile, own, labels, first, label, ahead)
        higher = torch.maximum(peak, high)
        old_share, share = (peak - higher).exp_(), (high - higher).exp_()
        peak, mass = higher, mass.mul_(old_share).addcmul_(more, share)
        if ahead:
            add_rows(total, tile @ part, old_share, share)
    norms = peak + mass.log()
    logprobs = label - norms
    if ahead:  # the label's own term is added once it is known: 1 - p would be lost in a tile's rounding
        rest = -torch.expm1(logprobs)
        rest = rest * (1 - (label / bend.cap).square()) if bend.cap else rest
        total = weight[labels].to(exact).mul_(rest[:, None]).addcdiv_(total, mass[:, None], value=-1).mul_(bend.scale)
    return logprobs, norms, total


def _score_back(
    factors: Tensor,
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    norms: Tensor,
    curve: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of states, weight and bias (empty without one), from logits computed again.

    `curve` is the scale and the soft cap.
    """
    scale, cap = curve
    to_states = torch.zeros(states.shape, dtype=norms.dtype, device=states.device)
    to_weight = torch.zeros(weight.shape, dtype=norms.dtype, device=states.device)
    to_bias = norms.new_zeros(0 if bias is None else len(weight))
    room = _room(states, weight)
    for span in _spans(len(states)):
        rows, own, scaled = states[span].contiguous(), labels[span].contiguous(), factors[span].contiguous()
        for first, part, tile in _each_tile(rows, weight, room):
            columns = slice(first, first + len(part))
            bend = Bend(None if bias is None else bias[columns], scale, cap)
            slope_tile(tile, bend, own, first, norms[span], scaled)
            to_states[span].add_(tile @ part)
            to_weight[columns].add_(tile.t() @ rows)
            if bias is not None:
                to_bias[columns].add_(tile.sum(0, dtype=norms.dtype))
    return to_states.to(states.dtype), to_weight.to(weight.dtype), to_bias.to(weight.dtype)


def _each_tile(rows: Tensor, weight: Tensor, room: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield for each tile its first column, its weight [n, H] and products [C, n]. Tiles share the memory."""
    size = _columns(rows)
    for first in range(0, len(weight), size):
        part = weight[first : first + size]
        tile = room[: len(rows) * len(part)].view(len(rows), len(part))
        yield first, part, torch.mm(rows, part.t(), out=tile)


def _room(states: Tensor, weight: Tensor) -> Tensor:
    """Return memory for the largest tile. It may be one of a shorter span, which has more columns."""
    counts = {span.stop - span.start for span in _spans(len(states))}
    return states.new_empty(max((n * min(_columns(states[:n]), len(weight)) for n in counts), default=0))


def _columns(rows: Tensor) -> int:
    on_cpu = rows.device.type == "cpu"
    most = max(ELEMENTS["cpu" if on_cpu else "cuda"] // max(len(rows), 1), NARROWEST)
    return min(most, WIDEST) if on_cpu else most


def _spans(count: int) -> list[slice]:
    pieces = -(-count // ROWS)
    return [slice(count * i // pieces, count * (i + 1) // pieces) for i in range(pieces)]


def _fake(states: Tensor, weight: Tensor, bias: Any, labels: Any, scale: Any, cap: Any, ahead: bool) -> Any:
    exact = torch.promote_types(states.dtype, torch.float32)
    numbers = [states.new_empty(states.shape[0], dtype=exact) for _ in range(2)]
    return *numbers, torch.empty_like(states) if ahead else states.new_empty(0)


def _fake_back(factors: Any, states: Tensor, weight: Tensor, bias: Any, labels: Any, norms: Tensor, *rest: Any) -> Any:
    return torch.empty_like(states), torch.empty_like(weight), weight.new_empty(0 if bias is None else len(weight))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    states, weight, bias, labels, ctx.scale, ctx.cap, ctx.ahead = inputs
    _, norms, gradient = output
    ctx.mark_non_differentiable(norms, gradient)
    ctx.save_for_backward(*((gradient,) if ctx.ahead else (states, weight, bias, labels, norms)))


def _backward(ctx: Any, factors: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.ahead:
        (gradient,) = ctx.saved_tensors
        return (gradient * factors[:, None]).to(gradient.dtype), None, None, None, None, None, None
    states, weight, bias, labels, norms = ctx.saved_tensors
    gradients = BACKWARD(factors, states, weight, bias, labels, norms, [ctx.scale, ctx.cap])
    to_states, to_weight, to_bias = (
        t if needed else None for t, needed in zip(gradients, ctx.needs_input_grad, strict=False)
    )
    return to_states, to_weight, None if bias is None else to_bias, None, None, None, None


BACKWARD = register_operation(
    "score_labels_back(Tensor factors, Tensor states, Tensor weight, Tensor? bias, Tensor labels, Tensor norms, "
    "float[] curve) -> (Tensor, Tensor, Tensor)",
    _score_back,
    _fake_back,
)
FORWARD = register_operation(
    "score_labels(Tensor states, Tensor weight, Tensor? bias, Tensor labels, float scale, float cap, bool ahead) "
    "-> (Tensor, Tensor, Tensor)",
    _score,
    _fake,
    _save,
    _backward,
)
