"""What luthier-distill offers: the loss `distill`, described without importing torch."""

from __future__ import annotations

from typing import Literal

import attrs
from luthier import LossRecord, LuthierError, hookimpl, option

__all__ = ["Distill", "luthier_losses"]


@attrs.frozen(kw_only=True)
class Distill:
    """Options of `distill`."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = option(
        "forward_kl", help="The divergence of both distributions: KL(teacher || model), its reverse, or between both."
    )
    beta: float | None = option(
        None, help="Share of the teacher in the mixture that jsd compares both with; none: 0.5.", low=0.001, high=0.999
    )
    temperature: float = option(
        1.0, help="What both models' logits are divided by; its square multiplies the divergence.", low=0.01, high=100.0
    )
    top_k: int | None = option(None, help="Compare the teacher's likeliest tokens alone; none: every token.", low=1)
    add_tail: bool = option(
        True, help="With top_k, all other tokens count as one; without it, the likeliest are made to sum to 1."
    )
    ce_weight: float = option(0.0, help="Weight of the labels' own cross-entropy, which is added.", low=0.0, high=1e4)
    hidden_weight: float = option(
        0.0, help="Weight of the distance between both models' hidden states, which is added.", low=0.0, high=1e4
    )
    hidden_distance: Literal["cosine", "mse"] | None = option(
        None, help="How far two states are apart: 1 - cosine, or the mean squared difference; none: cosine."
    )
    hidden_layers: list[int] | None = option(
        None, help="The model's layers that are compared, as transformers counts states (-1: the last); none: [-1]."
    )
    teacher_layers: list[int] | None = option(None, help="The teacher's layers beside them; none: the same.")

    def __attrs_post_init__(self) -> None:
        if self.beta is not None and self.divergence != "jsd":
            _refuse("it is the mixture of jsd alone", "Leave it out, or choose jsd.", "beta", self.beta)
        if not self.add_tail and self.top_k is None:
            problem = "without top_k there is no tail to leave out"
            _refuse(problem, "Leave it out, or give top_k.", "add_tail", self.add_tail)
        if self.top_k == 1 and not self.add_tail:
            problem = "one token alone always has the probability 1, so there is nothing to learn"
            _refuse(problem, "Take more tokens, or leave add_tail on.", "top_k", self.top_k)
        self._check_hidden()

    def _check_hidden(self) -> None:
        for field in ("hidden_distance", "hidden_layers", "teacher_layers"):
            if getattr(self, field) is not None and not self.hidden_weight:
                problem = "hidden states are compared where hidden_weight is more than 0"
                _refuse(problem, "Leave it out, or give hidden_weight.", field, getattr(self, field))
        own, theirs = self.compared_layers
        if not own or len(own) != len(theirs):
            problem = f"{len(own)} layers of the model stand beside {len(theirs)} of the teacher"
            _refuse(problem, "Name as many of both, one or more.", "teacher_layers", self.teacher_layers)

    @property
    def compared_layers(self) -> tuple[list[int], list[int]]:
        """The model's layers, and the teacher's beside them."""
        own = [-1] if self.hidden_layers is None else self.hidden_layers
        return own, own if self.teacher_layers is None else self.teacher_layers


def _refuse(problem: str, remedy: str, field: str, found: object) -> None:
    raise LuthierError("recipe-conflict", problem, where=f"Distill.{field}", found=found, remedy=remedy)


@hookimpl
def luthier_losses() -> list[LossRecord]:
    return [
        LossRecord(
            name="distill",
            summary="Distillation: the divergence from a teacher's distribution of each supervised token.",
            options=Distill,
            build="luthier_distill.loss:DistillLoss",
            reference="luthier_distill.plain:plain_sums",
            needs="teacher",
        )
    ]
