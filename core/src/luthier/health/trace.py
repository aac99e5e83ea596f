"""The trace: it finds the module, parameter, row or loss that made the first number which is not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import attrs
import torch
from torch import Tensor, nn

from luthier.data.batches.batch import Batch
from luthier.distributed.world import World
from luthier.model.nonfinite import (
    Finding,
    Watch,
    _parameter,
    describe_nonfinite,
    dtype_of,
    floating_tensors,
    is_finite,
    local_part,
    rows_of,
)

AGAIN: Final = Finding(
    cause="none",
    place="",
    told="the same micro-batches, run again without compiled code, gave finite numbers: suspect a compiled kernel, "
    "the adapter's penalty or gradients_ready, or the hardware",
)


@attrs.frozen(kw_only=True, eq=False)
class Traceable:
    """The objects that a trace inspects. `accumulate(index, batches)` computes the gradient of a step again."""

    model: nn.Module
    step: nn.Module
    optimizer: torch.optim.Optimizer
    world: World
    accumulate: Callable[[int, list[Batch]], object]


def trace_step(traced: Traceable, index: int, batches: Sequence[Batch]) -> Finding:
    """Check weights and rows, then compute the gradient of step `index` again while watching every module.

    The weights stay unchanged and the gradients are dropped. Every micro-batch is run to its end, so that several
    processes stay in step; all of them get the first process's finding. Compiled code is run uncompiled.
    """
    finding = _first(traced.world, _parameter(traced.model) or _data(batches))
    if finding is not None:
        return finding
    watch = Watch(batches)
    traced.optimizer.zero_grad(set_to_none=True)
    with watch.over(traced.model, traced.step), torch.compiler.set_stance("force_eager"):
        traced.accumulate(index, list(batches))
    norm = _norm([p.grad for p in traced.model.parameters() if p.grad is not None])
    traced.optimizer.zero_grad(set_to_none=True)
    return _first(traced.world, watch.found) or _first(traced.world, norm) or AGAIN


def _first(world: World, own: Finding | None) -> Finding | None:
    """Return the finding of the lowest rank that has one. This is a collective."""
    findings = [(rank, values) for rank, values in enumerate(world.gather(None if own is None else own.to_plain()))]
    first = next(((rank, values) for rank, values in findings if values is not None), None)
    if first is None:
        return None
    rank, values = first
    suffix = f" of rank {rank}" if world.size > 1 and values["micro_batch"] else ""
    return attrs.evolve(Finding(**values), told=values["told"] + suffix, where=tuple(values["where"]))


def _data(batches: Sequence[Batch]) -> Finding | None:
    """Return a finding if the rows themselves bring such numbers, by their weights or by columns of the loss."""
    for number, batch in enumerate(batches, 1):
        for name, value in {"weight": batch.token_weights, **batch.columns}.items():
            nonfinite = next((tensor for tensor in floating_tensors(value) if not is_finite(tensor)), None)
            if nonfinite is not None:
                sentence = f"the rows' {name} holds {describe_nonfinite(nonfinite)}"
                rows = rows_of(value, batch) if isinstance(value, Tensor) else batch.where
                return Finding(cause="data", place=name, told=sentence, micro_batch=number, where=rows)
    return None


def _norm(gradients: list[Tensor]) -> Finding | None:
    """Return a finding if the gradients are finite one by one, but too large together."""
    most = torch.finfo(torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32).max
    # the norm adds squares, which overflow earlier
    if sum(float(local_part(g).double().square().sum()) for g in gradients) <= most:
        return None
    largest = max(float(local_part(g).abs().max()) for g in gradients if local_part(g).numel())
    sentence = f"every gradient is finite, the largest {largest:.3g}; their norm is beyond {dtype_of(gradients[0])}"
    return Finding(cause="norm", place="", told=sentence)
