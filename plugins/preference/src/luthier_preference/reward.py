"""Reward modelling (Bradley and Terry 1952), with the margins of Touvron et al. 2023 (arXiv 2307.09288)."""

from __future__ import annotations

import torch
from luthier import Batch, LossOutput, LuthierError, Policy
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier_preference.options import Reward
from luthier_preference.pairs import describe_pairs


class RewardLoss:
    """A pair costs -log sigmoid(chosen - rejected - margin), and optionally the squared sum of both rewards.

    The reward of an answer is the logit of `token` after its last token. So a row of the model's head is the reward
    head, and the model is trained, saved and merged as any causal model. Centring is that of Eisenstein et al. 2023
    (arXiv 2312.09244).
    """

    data = "preference"

    def __init__(self, options: Reward) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"reward": float(len(batch.pairs))}

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        rewards = self._rewards(policy, batch)
        differences = rewards[:, 0] - rewards[:, 1]
        margins = batch.columns["margin"].to(rewards) if "margin" in batch.columns else 0.0
        values = -logsigmoid(differences - margins)
        if self.options.center_rewards_coefficient:
            values = values + self.options.center_rewards_coefficient * rewards.sum(dim=1) ** 2
        return LossOutput(sums={"reward": values.sum()}, metrics=describe_pairs(rewards))

    def _rewards(self, policy: Policy, batch: Batch) -> Tensor:
        """Return the rewards of both answers of each pair, [P, 2] in float32 or better."""
        ends = (batch.document_starts[1:] - 1)[batch.pairs.flatten()].to(batch.device)  # [2P]
        logits = policy.head(policy.states(batch).index_select(0, ends))  # [2P, V]
        if self.options.token >= logits.shape[-1]:
            problem, remedy = f"the model's head has {logits.shape[-1]:,} columns", "Choose a token that it has."
            raise LuthierError("recipe-conflict", problem, where="loss.token", found=self.options.token, remedy=remedy)
        rewards = logits[:, self.options.token].unflatten(0, (-1, 2))
        return rewards.to(torch.promote_types(rewards.dtype, torch.float32))
