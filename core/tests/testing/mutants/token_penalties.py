"""Penalties of the tokens: one that is sound, and those that break one rule each."""

from __future__ import annotations

from typing import Any

import torch


class Confidence:
    """The weighted square of each supervised token's log-probability, which keeps it away from certainty."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def measure_tokens(self, policy, batch):
        return self.options.weight * self.cost(policy.token_logprobs(batch), batch)

    def cost(self, logprobs, batch):
        return logprobs.square()


class GivesASum(Confidence):
    def cost(self, logprobs, batch):
        return logprobs.square().sum()


class GivesAMean(Confidence):
    def cost(self, logprobs, batch):
        return logprobs.square() / max(len(batch.supervised), 1)


class CutsTheGradient(Confidence):
    def cost(self, logprobs, batch):
        return logprobs.detach().square()


class CentresOnTheBatch(Confidence):
    def cost(self, logprobs, batch):
        return (logprobs - logprobs.mean()).square()


class CountsPlaces(Confidence):
    def cost(self, logprobs, batch):
        return logprobs.square() * torch.arange(batch.num_tokens)


class LogOfCertainty(Confidence):
    def cost(self, logprobs, batch):
        return logprobs.exp().log().square()


class ForgetsIdleRanks(Confidence):
    def measure_tokens(self, policy, batch):
        return batch.token_weights * 0 if batch.idle else super().measure_tokens(policy, batch)


class AsksAReference(Confidence):
    def measure_tokens(self, policy, batch):
        return super().measure_tokens(policy, batch) - super().measure_tokens(policy.reference(), batch)
