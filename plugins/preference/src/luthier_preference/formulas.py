"""The formulas of DPO's loss types, as in TRL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from luthier_preference.options import Dpo
from luthier_preference.pairs import bounded_expm1, smoothed_logistic

LOG_TWO: Final = 0.6931471805599453


@attrs.frozen(kw_only=True, eq=False)
class Sides:
    """The chosen and rejected answers of P pairs, [P, 2] each.

    `ratios` are `logps` (log-probabilities) minus `reference` (the reference's), and `lengths` counts supervised
    tokens.
    """

    ratios: Tensor
    logps: Tensor
    reference: Tensor
    lengths: Tensor


def diverge(ratios: Tensor, options: Dpo) -> Tensor:
    """Return f'(exp(ratio)) of the f-divergence (Wang et al. 2023, arXiv 2309.16240), up to a constant."""
    if options.f_divergence_type == "forward_kl":
        return -bounded_expm1(-ratios)
    if options.f_divergence_type == "js_divergence":
        return LOG_TWO + logsigmoid(ratios)
    power = options.f_alpha_divergence_coef - 1
    if options.f_divergence_type == "reverse_kl" or abs(power) < 1e-6:
        return ratios
    return bounded_expm1(power * ratios) / power


def _sigmoid(sides: Sides, options: Dpo) -> Tensor:
    return smoothed_logistic(_logits(sides, options), options.label_smoothing)


def _sigmoid_norm(sides: Sides, options: Dpo) -> Tensor:
    """Return the sigmoid loss of ratios per token."""
    return -logsigmoid(options.beta * _difference(diverge(sides.ratios, options) / sides.lengths))


def _hinge(sides: Sides, options: Dpo) -> Tensor:
    """Return the loss of SLiC (Zhao et al. 2023, arXiv 2305.10425) on log ratios."""
    return torch.relu(1 - _logits(sides, options))


def _ipo(sides: Sides, options: Dpo) -> Tensor:
    """Return equation 17 of Azar et al. 2023 (arXiv 2310.12036), of ratios per token."""
    return (_difference(diverge(sides.ratios, options) / sides.lengths) - 1 / (2 * options.beta)) ** 2


def _robust(sides: Sides, options: Dpo) -> Tensor:
    """Return the estimate of Chowdhury et al. 2024 (arXiv 2403.00409), unbiased if the smoothing equals the noise."""
    logits, share = _logits(sides, options), options.label_smoothing
    return (-(1 - share) * logsigmoid(logits) + share * logsigmoid(-logits)) / (1 - 2 * share)


def _exo_pair(sides: Sides, options: Dpo) -> Tensor:
    """Return equation 16 of Ji et al. 2024 (arXiv 2402.00856): the reverse KL to the smoothed preference."""
    logits = _logits(sides, options)
    target = torch.tensor([1 - options.label_smoothing, options.label_smoothing], dtype=torch.float64).log().tolist()
    wins = torch.sigmoid(logits) * (logsigmoid(logits) - target[0])
    return wins + torch.sigmoid(-logits) * (logsigmoid(-logits) - target[1])


def _nca_pair(sides: Sides, options: Dpo) -> Tensor:
    """Return the pairwise loss of Chen et al. 2024 (arXiv 2402.05369)."""
    rewards = options.beta * sides.ratios
    return -logsigmoid(rewards[:, 0]) - 0.5 * logsigmoid(-rewards).sum(dim=1)


def _bco_pair(sides: Sides, options: Dpo) -> Tensor:
    """Return the pairwise loss of Jung et al. 2024 (arXiv 2404.04656), without a shift, as in TRL."""
    rewards = options.beta * sides.ratios
    return -logsigmoid(rewards[:, 0]) - logsigmoid(-rewards[:, 1])


def _sppo_hard(sides: Sides, options: Dpo) -> Tensor:
    """Return equation 4.7 of Wu et al. 2024 (arXiv 2405.00675), with a certain win of the chosen answer."""
    return (sides.ratios[:, 0] - 0.5 / options.beta) ** 2 + (sides.ratios[:, 1] + 0.5 / options.beta) ** 2


def _aot(sides: Sides, options: Dpo) -> Tensor:
    """Return the paired loss of Melnyk et al. 2024 (arXiv 2406.05882): sorted margins of policy and reference."""
    policy, reference = _difference(sides.logps).sort().values, _difference(sides.reference).sort().values
    return smoothed_logistic(options.beta * (policy - reference), options.label_smoothing)


def _aot_unpaired(sides: Sides, options: Dpo) -> Tensor:
    """Return the unpaired loss of the same paper: sorted log ratios of chosen and of rejected answers."""
    return smoothed_logistic(options.beta * _difference(sides.ratios.sort(dim=0).values), options.label_smoothing)


def _apo_zero(sides: Sides, options: Dpo) -> Tensor:
    """Return equation 7 of D'Oosterlinck et al. 2024 (arXiv 2408.06266): chosen answers become likelier."""
    rewards = options.beta * sides.ratios
    return torch.sigmoid(-rewards[:, 0]) + torch.sigmoid(rewards[:, 1])


def _apo_down(sides: Sides, options: Dpo) -> Tensor:
    """Return equation 8 of the same paper: both become less likely, rejected answers more so."""
    rewards = options.beta * sides.ratios
    return torch.sigmoid(rewards[:, 0]) + torch.sigmoid(-_difference(rewards))


def _discopop(sides: Sides, options: Dpo) -> Tensor:
    """Return equation 5 of Lu et al. 2024 (arXiv 2406.08414): logistic and exponential loss, mixed by the logit."""
    logits = _logits(sides, options)
    share = torch.sigmoid(logits / options.discopop_tau)
    return -logsigmoid(logits) * (1 - share) + (1 + bounded_expm1(-logits)) * share


def _logits(sides: Sides, options: Dpo) -> Tensor:
    return options.beta * _difference(diverge(sides.ratios, options))


def _difference(sides: Tensor) -> Tensor:
    return sides[:, 0] - sides[:, 1]


FORMULAS: Final[dict[str, Callable[[Sides, Dpo], Tensor]]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}  # (sides, options) -> the loss of each pair, [P], or of each rank for losses that sort
