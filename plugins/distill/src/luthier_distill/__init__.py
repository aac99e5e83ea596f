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
    attention_weight: float = option(
        0.0, help="Weight of the divergence of both models' attention relations, which is added.", low=0.0, high=1e4
    )
    attention_relations: list[Literal["query", "key", "value", "query_key"]] | None = option(
        None,
        help="The products whose softmax is compared: of queries, keys or values among themselves, or of queries and "
        "keys; none: [query, key, value].",
    )
    relation_heads: int | None = option(
        None,
        help="Heads into which each model's attention heads are regrouped; none: the greatest common divisor of both "
        "models' key-value heads.",
        low=1,
    )
    attention_layers: list[int] | None = option(
        None, help="Layers of the model whose attention is compared, from 0 (-1: the last); none: [-1]."
    )
    teacher_attention_layers: list[int] | None = option(
        None, help="Layers of the teacher whose attention they are compared with; none: the same."
    )

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
        self._check_attention()

    def _check_hidden(self) -> None:
        self._refuse_idle(("hidden_distance", "hidden_layers", "teacher_layers"), "hidden states", "hidden_weight")
        self._check_layers(self.compared_layers, "teacher_layers")

    def _check_attention(self) -> None:
        fields = ("attention_relations", "relation_heads", "attention_layers", "teacher_attention_layers")
        self._refuse_idle(fields, "attention relations", "attention_weight")
        self._check_layers(self.related_layers, "teacher_attention_layers")
        kinds = self.compared_relations
        if not kinds or len(set(kinds)) < len(kinds):
            problem = "each relation can be compared once, and at least one must be"
            _refuse(problem, "Name some of query, key, value and query_key.", "attention_relations", kinds)

    def _refuse_idle(self, fields: tuple[str, ...], compared: str, weight: str) -> None:
        for field in fields:
            if getattr(self, field) is not None and not getattr(self, weight):
                problem = f"{compared} are compared only if {weight} is above 0"
                _refuse(problem, f"Leave it out, or give {weight}.", field, getattr(self, field))

    def _check_layers(self, layers: tuple[list[int], list[int]], field: str) -> None:
        own, theirs = layers
        if not own or len(own) != len(theirs):
            problem = f"{len(own)} layers of the model cannot be compared with {len(theirs)} of the teacher"
            _refuse(problem, "Name equally many layers of both, at least one.", field, getattr(self, field))

    @property
    def compared_layers(self) -> tuple[list[int], list[int]]:
        """Return the layers of the model, and those of the teacher that they are compared with."""
        return _pair_layers(self.hidden_layers, self.teacher_layers)

    @property
    def related_layers(self) -> tuple[list[int], list[int]]:
        """Return the layers of the model whose attention is compared, and those of the teacher."""
        return _pair_layers(self.attention_layers, self.teacher_attention_layers)

    @property
    def compared_relations(self) -> list[str]:
        """Return the kinds of attention relations that are compared."""
        return ["query", "key", "value"] if self.attention_relations is None else list(self.attention_relations)


def _pair_layers(own: list[int] | None, theirs: list[int] | None) -> tuple[list[int], list[int]]:
    own = [-1] if own is None else own
    return own, own if theirs is None else theirs


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
