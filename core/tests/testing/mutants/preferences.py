"""Losses over pairs, judged answers and a state: sound ones, and those that break one rule each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from luthier.data.batches.batch import Batch
from luthier.plugins.contracts.values import LossOutput
from torch import Tensor
from torch.nn.functional import logsigmoid


class Preference:
    """sum over pairs of -log sigmoid(beta * (policy's margin - reference's margin) - the row's margin)."""

    data = "preference"

    def __init__(self, options: Any) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"pairs": float(len(batch.pairs))}

    def margins(self, policy: Any, batch: Batch) -> Tensor:
        """[P]"""
        gains = policy.token_logprobs(batch) - policy.reference().token_logprobs(batch)
        sums = batch.sum_by_document(gains)
        chosen, rejected = batch.pairs.to(sums.device).unbind(1)
        return self.options.beta * (sums[chosen] - sums[rejected]) - batch.columns["margin"]

    def __call__(self, policy: Any, batch: Batch) -> LossOutput:
        margins = self.margins(policy, batch)
        total = -logsigmoid(margins).sum()
        return LossOutput(sums={"pairs": total}, metrics={"wins": ((margins > 0).double().sum(), len(margins))})


class MeanOfPairs(Preference):
    def __call__(self, policy, batch):
        return LossOutput(sums={"pairs": -logsigmoid(self.margins(policy, batch)).mean()})


class OtherTerm(Preference):
    def terms(self, batch):
        return {"pair": float(len(batch.pairs))}


class PrefersRejected(Preference):
    def margins(self, policy, batch):
        return -super().margins(policy, batch)


class AsksForATeacher(Preference):
    def margins(self, policy, batch):
        return super().margins(policy, batch) + 0 * policy.teacher().token_logprobs(batch).sum()


class NamedAsTheRun(Preference):
    def __call__(self, policy, batch):
        output = super().__call__(policy, batch)
        return LossOutput(sums=output.sums, metrics={"samples": output.metrics["wins"]})


class ForgetsThePolicy(Preference):
    """Gives idle batches a number that nothing depends on."""

    def __call__(self, policy, batch):
        if not batch.num_units:
            return LossOutput(sums={"pairs": torch.zeros(())})
        return super().__call__(policy, batch)


class WholeBatch(Preference):
    """Every pair feels how large the others' margins are."""

    def margins(self, policy, batch):
        margins = super().margins(policy, batch)
        return margins / (1 + margins.detach().abs().sum())


class Coupled(Preference):
    """Scores documents in the place of units."""

    couples = "batch"

    def scores(self, policy, batch):
        return batch.sum_by_document(policy.token_logprobs(batch)), {}

    def combine(self, scores, fixed):
        return LossOutput(sums={"pairs": scores.sum()})


class Judged:
    """Answers judged good are made likelier, others less, against the reference."""

    data = "unpaired"

    def __init__(self, options: Any) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"judged": float(batch.num_units)}

    def __call__(self, policy: Any, batch: Batch) -> LossOutput:
        gains = policy.token_logprobs(batch) - policy.reference().token_logprobs(batch)
        own = batch.sum_by_document(gains)[batch.documents("text")]
        return LossOutput(sums={"judged": -logsigmoid(self.options.beta * own * self.signs(batch)).sum()})

    def signs(self, batch: Batch) -> Tensor:
        return torch.where(batch.columns["label"], 1.0, -1.0)


class ReadsLabelsBackwards(Judged):
    def signs(self, batch):
        return -super().signs(batch)


class ArrangesByChance(Preference):
    """Pairs each prompt with an answer that is drawn anew each time."""

    calls = 0

    def arrange(self, units):
        type(self).calls += 1
        passage = units[0].documents["chosen"]
        return [unit.with_document("other", passage.cut(0, 1 + self.calls % 2)) for unit in units]


class DropsAUnit(Preference):
    def arrange(self, units):
        return units[1:]


class Centred:
    """Squared distance of log-probabilities from their mean over the first batches."""

    data = "tokens"

    def __init__(self, options: Any) -> None:
        self.centre = torch.zeros(())

    def begin(self, context: Any) -> None:
        found = context.over(context.batches(2), lambda policy, batch: policy.token_logprobs(batch).mean())
        self.centre = torch.stack(found).mean()

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"centred": float(batch.token_weights[batch.supervised].sum())}

    def __call__(self, policy: Any, batch: Batch) -> LossOutput:
        distances = (policy.token_logprobs(batch) - self.centre).square() * (batch.labels >= 0) * batch.token_weights
        kept = torch.zeros_like(distances).index_fill(0, batch.supervised, 1.0)
        return LossOutput(sums={"centred": (distances * kept).sum()})

    def state(self) -> dict[str, Any]:
        return {"centre": self.centre}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.centre = state["centre"]


class ForgetsItsState(Centred):
    def load_state(self, state): ...
