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
        "forward_kl", help="The divergence: KL(teacher || model), its reverse, or a mixture of both (jsd)."
    )
    beta: float | None = option(
        None,
        help="With jsd: share of the teacher in the mixture that both are compared with; none: 0.5.",
        low=0.001,
        high=0.999,
    )
    temperature: float = option(
        1.0, help="Divisor of both models' logits; its square multiplies the divergence.", low=0.01, high=100.0
    )
    top_k: int | None = option(
        None, help="Compare only this many tokens, the teacher's most likely ones; none: every token.", low=1
    )
    add_tail: bool = option(
        True, help="With top_k: all other tokens count as one token; false: the top_k tokens are scaled to sum to 1."
    )
    ce_weight: float = option(0.0, help="Weight of the cross-entropy of the labels, which is added.", low=0.0, high=1e4)
    hidden_weight: float = option(
        0.0, help="Weight of the distance of both models' hidden states, which is added.", low=0.0, high=1e4
    )
    hidden_distance: Literal["cosine", "mse", "relation"] | None = option(
        None,
        help="Distance of two hidden states: 1 - cosine (the default), the mean squared difference, or that of their "
        "cosines with the document's other states.",
    )
    hidden_layers: list[int] | None = option(
        None, help="Layers of the model to compare, as transformers counts hidden states (-1: the last); none: [-1]."
    )
    teacher_layers: list[int] | None = option(None, help="Layers of the teacher to compare with them; none: the same.")

    def __attrs_post_init__(self) -> None:
        if self.beta is not None and self.divergence != "jsd":
            _refuse("only divergence jsd has a mixture", "Leave it out, or choose jsd.", "beta", self.beta)
        if not self.add_tail and self.top_k is None:
            problem = "add_tail has no effect without top_k"
            _refuse(problem, "Leave it out, or give top_k.", "add_tail", self.add_tail)
        if self.top_k == 1 and not self.add_tail:
            problem = "a single token always has probability 1, so nothing can be learned"
            _refuse(problem, "Take more tokens, or leave add_tail on.", "top_k", self.top_k)
        self._check_hidden()

    def _check_hidden(self) -> None:
        for field in ("hidden_distance", "hidden_layers", "teacher_layers"):
            if getattr(self, field) is not None and not self.hidden_weight:
                problem = "hidden states are compared only if hidden_weight is above 0"
                _refuse(problem, "Leave it out, or give hidden_weight.", field, getattr(self, field))
        own, theirs = self.compared_layers
        if not own or len(own) != len(theirs):
            problem = f"{len(own)} layers of the model cannot be compared with {len(theirs)} of the teacher"
            _refuse(problem, "Name equally many layers of both, at least one.", "teacher_layers", self.teacher_layers)

    @property
    def compared_layers(self) -> tuple[list[int], list[int]]:
        """Return the layers of the model, and those of the teacher that they are compared with."""
        own = [-1] if self.hidden_layers is None else self.hidden_layers
        return own, own if self.teacher_layers is None else self.teacher_layers


def _refuse(problem: str, remedy: str, field: str, value: object) -> None:
    raise LuthierError("recipe-conflict", problem, where=f"Distill.{field}", found=value, remedy=remedy)


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
