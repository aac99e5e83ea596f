"""One optimizer step: forward, backward, clip, step, over every micro-batch of the global batch."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Final, cast

import attrs
import torch
from torch import Tensor

from luthier.data.batches.batch import Batch
from luthier.data.batches.example_feed import Portion
from luthier.distributed.world import add_numbers
from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.model.weights.shard_tensors import own_shard, whole_tensor
from luthier.plugins.contracts.metric_names import check_metric_names
from luthier.plugins.contracts.values import Multipliers, Progress
from luthier.randomness import seed_all
from luthier.step.evaluation.evaluate import is_coupled
from luthier.step.losses.coupled import accumulate_coupled, list_terms
from luthier.step.losses.estimated import estimate_gradients, estimates_gradients
from luthier.step.losses.loss_output import PENALTY, weigh_output
from luthier.step.losses.meter import Meter, divide_sums
from luthier.step.out_of_memory import agree_memory, fit_memory
from luthier.step.setup import Setup
from luthier.step.start_weights import sum_penalties

DERIVED_CUT: Final = "derived_cut"  # the share of derived documents whose answer lost its end
log = get_logger()


@attrs.frozen(kw_only=True)
class Update:
    """The outcome of one optimizer step."""

    loss: float  # the objective of the global batch, penalty included
    terms: dict[str, tuple[float, float]]  # (sum, weight) of each term over the global batch
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    documents: int
    seconds: float
    metrics: dict[str, tuple[float, float]]  # (sum, count)
    finite: bool = True  # False: loss or gradient is not finite, and the weights have not moved
    overflowed: bool = False  # True: only the scale of the loss was too large, which is no fault
    micro_batches: int = 1  # micro-batches of each rank
    batches: tuple[Batch, ...] = ()  # kept if the step is not finite, to be examined

    def numbers(self) -> dict[str, Any]:
        """Return all fields except the batches, as a checkpoint keeps them until they are logged."""
        return attrs.asdict(self, filter=lambda field, _: field.name != "batches")


def pooled_loss(updates: Sequence[Update]) -> float:
    """Return the objective over several steps: each term's sum over its weight, and the mean penalty."""
    penalty = sum(u.metrics.get(PENALTY, (0.0, 1.0))[0] for u in updates) / len(updates)
    return sum(divide_sums([u.terms for u in updates]).values()) + penalty


def update_weights(setup: Setup, index: int, portion: Portion) -> Update:
    """Take step `index` (from 0) on the examples of `portion`; where loss or gradient is not finite, nothing moves."""
    began, lengths = time.perf_counter(), setup.packing.sizes(portion.examples)
    multipliers = setup.tell_progress(setup.progress_after(index, portion.begun))
    batches, meter = fit_memory(setup, lengths, lambda: _differentiated(setup, index, portion))
    seed_all(setup.recipe.seed, index)  # so that parts draw the same numbers on every rank, however the batch is cut
    penalty = _penalty(setup)
    loss = meter.loss + (penalty or 0.0)
    with setup.phases("optimizer"):
        norm = _clip(setup)
        finite = math.isfinite(loss) and math.isfinite(norm)
        overflowed = math.isfinite(loss) and setup.precision.overflowed(math.isfinite(norm), index)
        rate = _apply(setup, index, portion, multipliers) if finite else _drop(setup, portion)
    setup.progress = setup.progress_after(index + 1, portion.ended)
    return Update(
        loss=loss,
        terms=meter.shares(),
        grad_norm=norm,
        learning_rate=rate,
        tokens=sum(lengths),
        supervised_tokens=portion.num_supervised,
        documents=len(portion.examples),
        seconds=time.perf_counter() - began,
        micro_batches=len(batches),
        metrics={**(meter.pairs() if finite else {}), **_own_numbers(setup, portion, penalty)},
        finite=finite,
        overflowed=overflowed,
        batches=() if finite else tuple(batches),
    )


def _differentiated(setup: Setup, index: int, portion: Portion) -> tuple[list[Batch], Meter]:
    """This rank's micro-batches of the portion, and what came of them; their gradients lie in the parameters."""
    setup.optimizer.zero_grad(set_to_none=True)
    with setup.phases("data"):
        batches = list(setup.micro_batches(portion))
    return batches, accumulate_gradients(setup, index, batches)


def accumulate_gradients(setup: Setup, index: int, batches: list[Batch]) -> Meter:
    """Fill the gradients of the global batch's objective and return its sums; the same again at each call."""
    if estimates_gradients(setup):
        return estimate_gradients(setup, index, batches)
    if is_coupled(setup.loss):
        return accumulate_coupled(setup, index, batches)
    return _accumulate(setup, index, batches)


def _accumulate(setup: Setup, index: int, batches: list[Batch]) -> Meter:
    """Backward over each micro-batch, every term divided by its weight in the whole global batch."""
    terms = list_terms(setup, batches)
    weights = setup.world.sum_numbers(add_numbers(terms))
    meter, objectives = Meter(), []
    for number, (batch, own) in enumerate(zip(batches, terms, strict=True)):
        seed_all(setup.recipe.seed, index, setup.spread.number(number))
        with setup.spread.turn(last=number + 1 == len(batches)):
            with setup.phases("forward"):
                output = setup.spread.module(batch)
                objective = weigh_output(output, weights)
            if number + 1 == len(batches):
                agree_memory(setup, last=True)
            with setup.phases("backward"):
                setup.spread.backward(setup.precision.scaled(objective), batch)
        objectives += [] if objective is None else [objective.requires_grad]
        if not batch.idle:
            meter.add(output, own)
    if objectives and not any(objectives):
        _refuse_constant(setup)
    return meter.over(setup.world)


def _refuse_constant(setup: Setup) -> None:
    """Raise `part-invalid` where something is trained, although no micro-batch of the loss has a gradient."""
    if any(p.requires_grad for group in setup.adapter.groups() for p in group.parameters):
        problem = "its sums do not depend on any trained parameter, so that nothing would be learned"
        remedy = "Compute them from what the policy gives, without detaching it."
        raise LuthierError("part-invalid", problem, where="loss", remedy=remedy)


def _own_numbers(setup: Setup, portion: Portion, penalty: float | None) -> dict[str, tuple[float, float]]:
    """Return what parts have logged since the last step, the adapter's penalty, and the share of documents cut."""
    check_metric_names(setup.numbers, "context.log")
    logged = {name: (value, 1.0) for name, value in setup.numbers.items()}
    setup.numbers.clear()
    if portion.derived:
        logged[DERIVED_CUT] = (float(portion.cut), float(portion.derived))
    return logged if penalty is None else {**logged, PENALTY: (penalty, 1.0)}


def _penalty(setup: Setup) -> float | None:
    """Backward over the adapter's penalty and the recipe's, but for what is estimated; None where there is none."""
    total = sum_penalties(setup.adapter, setup.penalties)
    if total is None:
        return None
    if not estimates_gradients(setup):
        cast(Tensor, setup.precision.scaled(total)).backward()  # it is None for None only
    return float(whole_tensor(total.detach()))


def _clip(setup: Setup) -> float:
    """Unscale the gradients, tell the adapter, and clip them; returns their norm before, over all parameters."""
    if not estimates_gradients(setup):
        setup.precision.unscale(_gradients(setup))
    setup.adapter.gradients_ready()
    gradients = _gradients(setup)
    norm = whole_tensor(torch.nn.utils.get_total_norm(gradients))
    limit = setup.recipe.max_grad_norm
    if limit is not None and math.isfinite(float(norm)):
        scale = limit / (norm + 1e-6)  # the same formula as torch's clip_grad_norm_
        if float(scale) < 1.0:
            torch._foreach_mul_(gradients, scale)
    return float(norm)


def _gradients(setup: Setup) -> list[Tensor]:
    return [p.grad for g in setup.optimizer.param_groups for p in g["params"] if p.grad is not None]


def _drop(setup: Setup, portion: Portion) -> float:
    """Forget the gradients of a step whose numbers cannot be used; returns the learning rate that it had."""
    setup.optimizer.zero_grad(set_to_none=True)
    return setup.rate_of(portion)


def _apply(setup: Setup, index: int, portion: Portion, multipliers: Multipliers) -> float:
    """Set this step's rates, step, and tell the adapter; returns the learning rate."""
    rate = setup.rate_of(portion) * multipliers.lr
    for group, decay in zip(setup.optimizer.param_groups, setup.decays, strict=True):
        group["lr"] = rate * group.get("lr_scale", 1.0)
        group["weight_decay"] = decay * multipliers.weight_decay
    without_state = not setup.optimizer.state
    setup.precision.step(setup.optimizer, index)
    if without_state and setup.optimizer.state:
        _log_state(setup.optimizer)
    setup.adapter.stepped(Progress(step=index + 1, total_steps=setup.feed.total, epoch=portion.ended))
    return rate


def _log_state(optimizer: torch.optim.Optimizer) -> None:
    """Log how many bytes of state this rank keeps for each of its weights."""
    kept = [own_shard(v) for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    bytes_per_weight = sum(t.nbytes for t in kept) / max(sum(own_shard(w).numel() for w in optimizer.state), 1)
    log.debug("optimizer_state", optimizer=type(optimizer).__name__, bytes_per_weight=round(bytes_per_weight, 3))
