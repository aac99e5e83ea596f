"""The options of each optimizer."""

from __future__ import annotations

from typing import Literal

import attrs
from luthier import option

BETAS = "Decays of the two moments."
EPS = "Added to the denominator."
DECAY = "Decoupled weight decay."


@attrs.frozen(kw_only=True)
class AdamW8bit:
    """Options of the optimizer `adamw_8bit`."""

    betas: tuple[float, float] = option((0.9, 0.999), help=BETAS, low=0.0, high=0.9999)
    eps: float = option(1e-8, help=EPS, low=0.0)
    weight_decay: float = option(0.0, help=DECAY, low=0.0)


@attrs.frozen(kw_only=True)
class Muon:
    """Options of the optimizer `muon`."""

    momentum: float = option(0.95, help="Decay of the momentum of matrices.", low=0.0, high=0.9999)
    nesterov: bool = option(True, help="Use Nesterov's momentum.")
    ns_steps: int = option(5, help="Newton-Schulz iterations that make the momentum orthogonal.", low=1, high=20)
    adjust_lr: Literal["match_rms_adamw", "original"] = option(
        "match_rms_adamw",
        help="Size of a matrix's step: `match_rms_adamw` is for AdamW's learning rates (0.2 sqrt(larger side)), "
        "`original` for "
        "rates of about 0.02 (sqrt(rows / columns), at least 1).",
    )
    betas: tuple[float, float] = option(
        (0.9, 0.999),
        help="Decays of AdamW's two moments, for embeddings, head, norms and biases.",
        low=0.0,
        high=0.9999,
    )
    eps: float = option(1e-8, help="Added to AdamW's denominator.", low=0.0)
    weight_decay: float = option(0.0, help=DECAY, low=0.0)


@attrs.frozen(kw_only=True)
class Adafactor:
    """Options of the optimizer `adafactor`."""

    beta2_decay: float = option(
        -0.8, help="Exponent of the second moment's decay: beta2 is 1 - step^beta2_decay.", high=0.0
    )
    clip: float = option(1.0, help="Largest root mean square of a step; larger steps are scaled down.", low=1.0)
    eps: float = option(
        1e-3, help="Lower bound of the root mean square of a weight, by which its step is scaled.", low=0.0
    )
    weight_decay: float = option(0.0, help=DECAY, low=0.0)


@attrs.frozen(kw_only=True)
class ScheduleFree:
    """Options of the optimizer `schedule_free`."""

    momentum: float = option(
        0.9, help="Share of the average in the point at which gradients are taken.", low=0.1, high=0.9999
    )
    beta2: float = option(0.999, help="Decay of the second moment.", low=0.0, high=0.9999)
    eps: float = option(1e-8, help=EPS, low=0.0)
    weight_decay: float = option(0.0, help="Weight decay, applied at the point at which gradients are taken.", low=0.0)
    r: float = option(0.0, help="Exponent of the step number in the weights of the average.", low=0.0)
    weight_lr_power: float = option(2.0, help="Exponent of the largest learning rate so far in these weights.", low=0.0)


@attrs.frozen(kw_only=True)
class AdEMAMix:
    """Options of the optimizer `ademamix`."""

    betas: tuple[float, float, float] = option(
        (0.9, 0.999, 0.9999), help="Decays of the fast, the second and the slow moment.", low=0.0, high=0.99999
    )
    alpha: float = option(5.0, help="Weight of the slow momentum.", low=0.0)
    warmup_steps: int = option(
        0,
        help="Steps over which alpha grows from 0, and the slow decay from the fast one; for long runs, all steps.",
        low=0,
    )
    eps: float = option(1e-8, help=EPS, low=0.0)
    weight_decay: float = option(0.0, help=DECAY, low=0.0)


@attrs.frozen(kw_only=True)
class Apollo:
    """Options of the optimizer `apollo`."""

    rank: int = option(128, help="Rank of the projection of a gradient; 1 with scale_by tensor is APOLLO-Mini.", low=1)
    scale_by: Literal["channel", "tensor"] = option("channel", help="Weights that share a step size.")
    scale: float = option(1.0, help="Factor of the steps of projected matrices; about 11 for APOLLO-Mini.", low=0.0)
    refresh_steps: int = option(200, help="Steps between two random projections.", low=1)
    max_growth: float = option(
        1.01, help="Largest ratio of a step's length to the previous one's; 0: no limit.", low=0.0
    )
    betas: tuple[float, float] = option((0.9, 0.999), help=BETAS, low=0.0, high=0.9999)
    eps: float = option(1e-8, help=EPS, low=0.0)
    weight_decay: float = option(0.0, help=DECAY, low=0.0)
    seed: int = option(0, help="Seed of the projections.", low=0)


@attrs.frozen(kw_only=True)
class PagedAdamW:
    """Options of the optimizer `paged_adamw`."""

    betas: tuple[float, float] = option((0.9, 0.999), help=BETAS, low=0.0, high=0.9999)
    eps: float = option(1e-8, help=EPS, low=0.0)
    weight_decay: float = option(0.0, help=DECAY, low=0.0)
    folder: str | None = option(None, help="Folder of the file, on a fast disk; none: the folder of temporary files.")
    chunk: int = option(1 << 22, help="Number of weights whose moments are in memory at once.", low=1)


@attrs.frozen(kw_only=True)
class Evolution:
    """Options of the optimizer `evolution`."""

    sigma: float = option(0.02, help="Standard deviation of the perturbations of each weight.", low=1e-4)
    pairs: int = option(16, help="Pairs of opposite perturbations in a step; each costs two forward passes.", low=1)
    shaping: Literal["ranks", "z_score", "none"] = option(
        "ranks",
        help="How losses become weights of perturbations: by their `ranks` from -1/2 to 1/2, by `z_score`, or as they "
        "are; `none` with an infinite number of pairs gives the gradient.",
    )
    rank: int = option(
        0, help="Rank of the perturbation of a matrix, whose two factors are drawn; 0: each weight is drawn.", low=0
    )
    betas: tuple[float, float] = option((0.9, 0.999), help=BETAS, low=0.0, high=0.9999)
    eps: float = option(1e-8, help=EPS, low=1e-12)
    weight_decay: float = option(0.0, help=DECAY, low=0.0)


@attrs.frozen(kw_only=True)
class Auto:
    """Options of the optimizer `auto`."""

    memory_share: float = option(
        0.25,
        help="Share of the device's memory that the state may take: `adamw` where 8 bytes a weight fit, else "
        "`adamw_8bit` where 2.03 do, else `paged_adamw`.",
        low=0.0,
        high=1.0,
    )
    betas: tuple[float, float] = option((0.9, 0.999), help=BETAS, low=0.0, high=0.9999)
    eps: float = option(1e-8, help=EPS, low=0.0)
    weight_decay: float = option(0.0, help=DECAY, low=0.0)
    folder: str | None = option(None, help="Where the file of `paged_adamw` lies, if it comes to that.")
