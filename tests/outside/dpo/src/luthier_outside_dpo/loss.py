"""DPO (Rafailov et al. 2023, arXiv 2305.18290), the sigmoid loss of TRL."""

from __future__ import annotations

from luthier import Batch, LossOutput, Policy
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier_outside_dpo import Dpo


class DpoLoss:
    """Per pair: -log sigmoid(beta * (log-ratio of the chosen answer - log-ratio of the rejected one))."""

    data = "preference"

    def __init__(self, options: Dpo) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"preference": float(len(batch.pairs))}

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        ratios = policy.token_logprobs(batch) - policy.reference().token_logprobs(batch)
        rewards = self.options.beta * batch.sum_by_document(ratios)  # [D]
        chosen, rejected = rewards[batch.pairs.to(rewards.device)].unbind(1)
        margins = (chosen - rejected).detach()
        metrics = {"margins": (margins.sum(), float(len(margins))), "wins": ((margins > 0).sum(), float(len(margins)))}
        return LossOutput(sums={"preference": -logsigmoid(chosen - rejected).sum()}, metrics=metrics)


def plain_sums(options: Dpo, policy: Policy, batch: Batch) -> dict[str, Tensor]:
    """Return the same sum pair by pair; for the tests."""
    own, other, documents = policy.token_logprobs(batch), policy.reference().token_logprobs(batch), batch.document_ids()
    total = own.new_zeros(())
    for chosen, rejected in batch.pairs.tolist():
        better, worse = ((own - other)[documents == side].sum() for side in (chosen, rejected))
        total = total - logsigmoid(options.beta * (better - worse))
    return {"preference": total}
