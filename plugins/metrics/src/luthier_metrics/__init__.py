"""What luthier-metrics offers: metrics over generated answers, described without importing their libraries."""

from __future__ import annotations

from typing import Literal

import attrs
from luthier import LuthierError, MetricRecord, hookimpl, option

__all__ = ["Bleu", "Custom", "ExactMatch", "PassAtK", "Rouge", "luthier_metrics"]


@attrs.frozen(kw_only=True)
class ExactMatch:
    """Options of `exact_match`."""

    ignore_case: bool = option(False, help="Ignore the difference of upper and lower case.")
    ignore_punctuation: bool = option(False, help="Ignore punctuation.")


@attrs.frozen(kw_only=True)
class Bleu:
    """Options of `bleu`."""

    tokenize: Literal["13a", "intl", "char", "none", "zh"] = option("13a", help="sacrebleu's tokenizer.")
    lowercase: bool = option(False, help="Ignore the difference of upper and lower case.")
    smooth_method: Literal["exp", "floor", "add-k", "none"] = option(
        "exp", help="sacrebleu's smoothing of n-gram orders without a match."
    )


@attrs.frozen(kw_only=True)
class Rouge:
    """Options of `rouge`."""

    kind: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = option("rougeL", help="The overlaps that are counted.")
    use_stemmer: bool = option(False, help="Compare words by their stem (Porter, English).")


@attrs.frozen(kw_only=True)
class PassAtK:
    """Options of `pass_at_k`."""

    k: int = option(1, help="Number of answers of which at least one must be right.", low=1)
    num_answers: int = option(8, help="Number of answers sampled for each prompt, at least k.", low=1)
    temperature: float = option(0.8, help="Temperature at which answers are sampled.", low=1e-3, high=10.0)
    judge: str = option(
        "exact",
        help="When an answer is right: exact, contains, number (the last numbers are equal), or `module:function`.",
    )

    def __attrs_post_init__(self) -> None:
        if self.k > self.num_answers:
            raise LuthierError("recipe-conflict", f"{self.k} answers cannot be taken from {self.num_answers}",
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
    """Return the metrics that judge an answer as right or wrong."""
    return [
        MetricRecord(
            name="exact_match",
            summary="Share of answers that equal their reference.",
            options=ExactMatch,
            build="luthier_metrics.matching:ExactMatchMetric",
        ),
        MetricRecord(
            name="pass_at_k",
            summary="Probability that at least one of k sampled answers is right.",
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
    """Return the metrics that count overlaps of an answer with its reference."""
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
