"""Step: the module whose forward is the loss over one micro-batch. DDP and FSDP2 wrap this and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from luthier.data.batches.batch import Batch
from luthier.model.policy import ModelPolicy
from luthier.plugins.contracts.protocols import Adapter, Loss
from luthier.plugins.contracts.side_protocols import Penalty
from luthier.plugins.contracts.values import LossOutput
from luthier.step.losses.loss_output import ROUTER, check_output, check_scores, check_terms
from luthier.step.losses.token_penalties import count_tokens, name_penalties, penalise_tokens


class Step(nn.Module):
    """`forward(batch)` gives a `LossOutput`; outside it nothing touches the model. It runs inside `computing()`."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        loss: Loss,
        *,
        penalties: Mapping[str, Penalty] | None = None,
        router_coefficient: float = 0.0,
        computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.model, self.adapter, self.loss = model, adapter, loss
        self.router_coefficient, self.computing = router_coefficient, computing
        self.penalties = name_penalties(penalties or {})
        self.policy = ModelPolicy(model, adapter)
        self.policy.want_routers = router_coefficient > 0
        # coupled losses get their gradient from `combine`, and penalties may ask for log-probabilities too
        if getattr(loss, "couples", "nothing") == "nothing" and not self.penalties:
            self.policy.coefficients = getattr(loss, "coefficients", None)

    def terms(self, batch: Batch) -> dict[str, float]:
        """This micro-batch's share of each denominator."""
        own = check_terms(self.loss.terms(batch)) | dict.fromkeys(self.penalties, count_tokens(batch))
        return {**own, ROUTER: float(batch.num_tokens)} if self.router_coefficient else own

    def forward(self, batch: Batch, compute: Callable[[ModelPolicy, Batch], Any] | None = None) -> Any:
        """Return `compute(policy, batch)`; without it, the loss of this micro-batch."""
        self.policy.forget()
        try:
            with self.computing():
                return (compute or self.compute_loss)(self.policy, batch)
        finally:
            self.policy.forget()

    def compute_loss(self, policy: ModelPolicy, batch: Batch) -> LossOutput:
        """Return the loss of this micro-batch, with the run's own terms."""
        output, own = check_output(self.loss(policy, batch), "the loss"), self._own_terms(policy, batch)
        output.sums.update(own.sums)
        return dataclasses.replace(output, metrics={**output.metrics, **own.metrics})

    def compute_scores(self, policy: ModelPolicy, batch: Batch) -> tuple[Tensor, dict[str, Tensor], LossOutput]:
        """Return scores and fixed tensors of a loss that couples the batch, and the run's own terms."""
        scores, fixed = check_scores(self.loss.scores(policy, batch), batch)
        return scores, fixed, self._own_terms(policy, batch)

    def _own_terms(self, policy: ModelPolicy, batch: Batch) -> LossOutput:
        """Return the penalties of the tokens, and the balance of experts where the run asks for it."""
        penalties = self.penalties if self.model.training else {}  # an evaluation leaves them out
        penalised, router = penalise_tokens(penalties, policy, batch), self._balance_experts(batch)
        return LossOutput(sums=penalised.sums | router.sums, metrics={**penalised.metrics, **router.metrics})

    def _balance_experts(self, batch: Batch) -> LossOutput:
        if not self.router_coefficient:
            return LossOutput(sums={})
        config: Any = self.model.config
        top_k = config.num_experts_per_tok
        balance = router_balance(self.policy.router_logits(batch), top_k, batch)
        summed = (balance * batch.lengths.to(balance.device)).sum()
        metrics = {ROUTER: (summed.detach(), float(batch.num_tokens))}
        return LossOutput(sums={ROUTER: self.router_coefficient * summed}, metrics=metrics)


def router_balance(routers: Sequence[Tensor], top_k: int, batch: Batch) -> Tensor:
    """Return [D]: the load-balancing loss of each document (Switch Transformer, eq. 4 to 6, as transformers has it).

    Per document, so that it does not depend on what a document was packed with: a documented difference.
    """
    losses = []
    for start, end in zip(batch.document_starts[:-1], batch.document_starts[1:], strict=True):
        probabilities = torch.cat([r[start:end] for r in routers]).float().softmax(-1)  # [layers * L, E]
        experts = probabilities.shape[-1]
        chosen = nn.functional.one_hot(probabilities.topk(top_k, -1).indices, experts).float()  # [.., k, E]
        losses.append((chosen.mean(0) * probabilities.mean(0)).sum() * experts)
    return torch.stack(losses)
