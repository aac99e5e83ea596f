"""The reference of a trainer, frozen: the base model, or the policy as it begins."""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from torch import Tensor, nn

from luthier.plugins.contracts.protocols import Adapter
from luthier.step.reference.reference_check import rounding_bound

TOKENS: Final = 16  # tokens of the input on which the policy is compared with and without its adapter


def freeze_policy(model: Any, adapter: Adapter, named: str, *, switchable: bool, fresh: bool) -> nn.Module:
    """Return what a recipe's `reference` names: `base`, `initial` (the policy as it is now), or `auto`.

    `auto` is the base for a `fresh` adapter, even where its start changes the model, and `initial` for one that was
    trained before. A copy is made where the adapter is not `switchable`, or computes something when it is switched on.
    """
    is_base = named == "base" or (fresh and named == "auto")
    if switchable and (is_base or (fresh and _changes_nothing(model, adapter))):
        return WithoutAdapter(model, adapter)
    return copy.deepcopy(model).requires_grad_(False).eval()


class WithoutAdapter(nn.Module):
    """A policy with its adapter off, which holds none of its weights a second time."""

    def __init__(self, model: Any, adapter: Adapter) -> None:
        super().__init__()
        self._held = (model, adapter)  # a tuple, so that `eval` and `to` do not reach the policy's modules

    @property
    def config(self) -> Any:
        """Return the policy's config."""
        return self._held[0].config

    @torch.no_grad()
    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Compute what the policy computes without its adapter."""
        model, adapter = self._held
        with adapter.disabled():
            return model(*arguments, **named)


def _changes_nothing(model: Any, adapter: Adapter) -> bool:
    """Return True if policy and policy without adapter agree on tokens from the whole vocabulary, dropout off."""
    training = model.training
    model.eval()
    try:
        own = _token_logprobs(model)
        with adapter.disabled():
            other = _token_logprobs(model)
    finally:
        model.train(training)
    return float((own - other).abs().max()) <= rounding_bound(full=model.dtype.itemsize > 2)  # NaN gives False


@torch.no_grad()
def _token_logprobs(model: Any) -> Tensor:
    """Return [TOKENS - 1] float32: of each token but the first, given those before it."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.linspace(0, vocabulary - 1, TOKENS, device=model.device).long()
    logits = model(input_ids=tokens[None], attention_mask=torch.ones_like(tokens)[None], use_cache=False).logits
    return logits[0, :-1].float().log_softmax(-1).gather(-1, tokens[1:, None]).squeeze(-1)
