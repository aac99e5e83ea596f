"""Penalties of the tokens: their costs summed over a micro-batch, each token by its weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from luthier.data.batches.batch import Batch
from luthier.errors import LuthierError
from luthier.plugins.contracts.policy_protocol import Policy
from luthier.plugins.contracts.side_protocols import Penalty
from luthier.plugins.contracts.values import LossOutput
from luthier.step.losses.loss_output import PENALTY


def count_tokens(batch: Batch) -> float:
    """Return the weight of the supervised tokens, by which the sum over the global batch is divided."""
    return float(batch.token_weights[batch.supervised].sum(dtype=torch.float64))


def sum_tokens(penalty: Penalty, policy: Policy, batch: Batch) -> Tensor:
    """Return the sum of a penalty's costs over the supervised tokens, each times its weight.

    Raises `part-invalid` if the part does not return one cost for each token.
    """
    costs = penalty.measure_tokens(policy, batch)
    if not isinstance(costs, Tensor) or costs.shape != (batch.num_tokens,):
        shape = tuple(costs.shape) if isinstance(costs, Tensor) else type(costs).__name__
        problem = f"measure_tokens returns a cost for each token, [{batch.num_tokens}] here"
        raise LuthierError("part-invalid", problem, where="penalty", found=shape)
    positions = batch.supervised.to(costs.device)
    return (costs[positions] * batch.token_weights[batch.supervised].to(costs)).sum()


def penalise_tokens(penalties: Mapping[str, Penalty], policy: Policy, batch: Batch) -> LossOutput:
    """Return the term and the metric of each penalty, by its name."""
    sums = {name: sum_tokens(penalty, policy, batch) for name, penalty in penalties.items()}
    weight = count_tokens(batch)
    return LossOutput(sums=sums, metrics={name: (value.detach(), weight) for name, value in sums.items()})


def name_penalties(penalties: Mapping[str, Penalty]) -> dict[str, Penalty]:
    """Return the penalties of tokens by the names of their terms."""
    return {f"{PENALTY}/{name}": penalty for name, penalty in penalties.items() if penalty.over == "tokens"}
