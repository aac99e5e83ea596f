"""What luthier-metrics offers: metrics over generated answers, described without importing what computes them."""

from __future__ import annotations

from typing import Literal

import attrs
from luthier import LuthierError, MetricRecord, hookimpl, option

__all__ = ["Bleu", "Custom", "ExactMatch", "PassAtK", "Rouge", "luthier_metrics"]


@attrs.frozen(kw_only=True)
class ExactMatch:
    """Options of `exact_match`."""

    ignore_case: bool = option(False, help="Capital letters do not matter.")
    ignore_punctuation: bool = option(False, help="Punctuation does not matter.")


@attrs.frozen(kw_only=True)
class Bleu:
    """Options of `bleu`."""

    tokenize: Literal["13a", "intl", "char", "none", "zh"] = option("13a", help="How sacrebleu divides a text.")
    lowercase: bool = option(False, help="Capital letters do not matter.")
    smooth_method: Literal["exp", "floor", "add-k", "none"] = option("exp", help="How sacrebleu counts no match.")


@attrs.frozen(kw_only=True)
class Rouge:
    """Options of `rouge`."""

    kind: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = option("rougeL", help="What overlaps are counted.")
    use_stemmer: bool = option(False, help="Words count by their stem (Porter), in English.")


@attrs.frozen(kw_only=True)
class PassAtK:
    """Options of `pass_at_k`."""

    k: int = option(1, help="Answers of which one must be right.", low=1)
    num_answers: int = option(8, help="Answers that are drawn for each prompt, k or more.", low=1)
    temperature: float = option(0.8, help="Temperature that they are drawn at.", low=1e-3, high=10.0)
    judge: str = option(
        "exact", help="What is right: exact, contains, number (the last one of each), or `module:function`."
    )

    def __attrs_post_init__(self) -> None:
        if self.k > self.num_answers:
            raise LuthierError("recipe-conflict", f"of {self.num_answers} answers no {self.k} can be taken",
                               where="PassAtK.k", found=self.k, remedy="Raise num_answers, or lower k.")  # fmt: skip


@attrs.frozen(kw_only=True)
class Custom:
    """Options of `custom`."""

    function: str = option(help="`module:function`, which takes (prediction, reference) and returns a number.")


@hookimpl
def luthier_metrics() -> list[MetricRecord]:
    """Return the records of all metrics."""
    return [*_matching_metrics(), *_overlap_metrics()]


def _matching_metrics() -> list[MetricRecord]:
    """Return the metrics that say of an answer whether it is right."""
    return [
        MetricRecord(
            name="exact_match",
            summary="Share of answers that are their reference.",
            options=ExactMatch,
            build="luthier_metrics.matching:ExactMatchMetric",
        ),
        MetricRecord(
            name="pass_at_k",
            summary="Probability that one of k drawn answers is right.",
            options=PassAtK,
            build="luthier_metrics.matching:PassAtKMetric",
        ),
        MetricRecord(
            name="custom",
            summary="Mean of a function of yours over answers and references.",
            options=Custom,
            build="luthier_metrics.matching:CustomMetric",
        ),
    ]


def _overlap_metrics() -> list[MetricRecord]:
    """Return the metrics that count what an answer has in common with its reference."""
    return [
        MetricRecord(
            name="bleu",
            summary="Corpus BLEU of all answers, 0 to 100, as sacrebleu computes it.",
            options=Bleu,
            build="luthier_metrics.overlap:BleuMetric",
        ),
        MetricRecord(
            name="rouge",
            summary="Mean F-measure of the overlap, as rouge-score computes it.",
            options=Rouge,
            build="luthier_metrics.overlap:RougeMetric",
        ),
    ]
