"""DPO (Rafailov et al. 2023, arXiv 2305.18290) and the other losses on log ratios of a pair, as TRL computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from luthier import Batch, LossOutput, Policy
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier_preference import Dpo
from luthier_preference.pairs import count_pairs, describe_pairs, smoothed_logistic, sum_pairs


class DpoLoss:
    """The mean over pairs of what `loss_type` makes of both log ratios to the reference.

    TRL 1.16 ignores `label_smoothing` where the type is sigmoid; here it is conservative DPO (Mitchell 2023).
    """

    data = "preference"

    def __init__(self, options: Dpo) -> None:
        self.options = options

    def terms(self, batch: Batch) -> dict[str, float]:
        return {"dpo": float(len(batch.pairs))}

    def __call__(self, policy: Policy, batch: Batch) -> LossOutput:
        logprobs = policy.token_logprobs(batch)
        ratios = sum_pairs(batch, logprobs - policy.reference().token_logprobs(batch))
        values = FORMULAS[self.options.loss_type](ratios, count_pairs(batch, ratios), self.options)
        metrics = describe_pairs(self.options.beta * ratios, sum_pairs(batch, logprobs))
        return LossOutput(sums={"dpo": values.sum()}, metrics=metrics)


def _sigmoid(ratios: Tensor, lengths: Tensor, options: Dpo) -> Tensor:
    return smoothed_logistic(options.beta * _difference(ratios), options.label_smoothing)


def _sigmoid_norm(ratios: Tensor, lengths: Tensor, options: Dpo) -> Tensor:
    """Return the sigmoid loss of ratios per token."""
    return -logsigmoid(options.beta * _difference(ratios / lengths))


def _hinge(ratios: Tensor, lengths: Tensor, options: Dpo) -> Tensor:
    """Return the loss of SLiC (Zhao et al. 2023, arXiv 2305.10425) on log ratios."""
    return torch.relu(1 - options.beta * _difference(ratios))


def _ipo(ratios: Tensor, lengths: Tensor, options: Dpo) -> Tensor:
    """Return equation 17 of Azar et al. 2023 (arXiv 2310.12036), of ratios per token."""
    return (_difference(ratios / lengths) - 1 / (2 * options.beta)) ** 2


def _robust(ratios: Tensor, lengths: Tensor, options: Dpo) -> Tensor:
    """Return the estimate of Chowdhury et al. 2024 (arXiv 2403.00409), unbiased where the smoothing is the noise."""
    logits, share = options.beta * _difference(ratios), options.label_smoothing
    return (-(1 - share) * logsigmoid(logits) + share * logsigmoid(-logits)) / (1 - 2 * share)


def _exo_pair(ratios: Tensor, lengths: Tensor, options: Dpo) -> Tensor:
    """Return equation 16 of Ji et al. 2024 (arXiv 2402.00856): the reverse KL to the smoothed preference."""
    logits = options.beta * _difference(ratios)
    target = torch.tensor([1 - options.label_smoothing, options.label_smoothing], dtype=torch.float64).log().tolist()
    wins = torch.sigmoid(logits) * (logsigmoid(logits) - target[0])
    return wins + torch.sigmoid(-logits) * (logsigmoid(-logits) - target[1])


def _nca_pair(ratios: Tensor, lengths: Tensor, options: Dpo) -> Tensor:
    """Return the pairwise loss of Chen et al. 2024 (arXiv 2402.05369)."""
    rewards = options.beta * ratios
    return -logsigmoid(rewards[:, 0]) - 0.5 * logsigmoid(-rewards).sum(dim=1)


def _bco_pair(ratios: Tensor, lengths: Tensor, options: Dpo) -> Tensor:
    """Return the pairwise loss of Jung et al. 2024 (arXiv 2404.04656), without a shift, as in TRL."""
    rewards = options.beta * ratios
    return -logsigmoid(rewards[:, 0]) - logsigmoid(-rewards[:, 1])


def _sppo_hard(ratios: Tensor, lengths: Tensor, options: Dpo) -> Tensor:
    """Return equation 4.7 of Wu et al. 2024 (arXiv 2405.00675), the chosen answer winning for certain."""
    return (ratios[:, 0] - 0.5 / options.beta) ** 2 + (ratios[:, 1] + 0.5 / options.beta) ** 2


def _apo_zero(ratios: Tensor, lengths: Tensor, options: Dpo) -> Tensor:
    """Return equation 7 of D'Oosterlinck et al. 2024 (arXiv 2408.06266): chosen answers become likelier."""
    rewards = options.beta * ratios
    return torch.sigmoid(-rewards[:, 0]) + torch.sigmoid(rewards[:, 1])


def _apo_down(ratios: Tensor, lengths: Tensor, options: Dpo) -> Tensor:
    """Return equation 8 of the same paper: both become less likely, rejected answers more so."""
    rewards = options.beta * ratios
    return torch.sigmoid(rewards[:, 0]) + torch.sigmoid(-_difference(rewards))


def _difference(sides: Tensor) -> Tensor:
    return sides[:, 0] - sides[:, 1]


FORMULAS: Final[dict[str, Callable[[Tensor, Tensor, Dpo], Tensor]]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}  # log ratios [P, 2], answers' lengths [P, 2] and options give the loss of each pair, [P]
