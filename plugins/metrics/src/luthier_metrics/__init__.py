"""What luthier-metrics offers: metrics over generated answers, described without importing what computes them."""

from __future__ import annotations

from typing import Final, Literal

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
    return [
        MetricRecord(name=name, summary=summary, options=options, build=f"luthier_metrics.{build}")
        for name, (summary, options, build) in METRICS.items()
    ]


METRICS: Final = {
    "exact_match": ("Share of answers that are their reference.", ExactMatch, "matching:ExactMatchMetric"),
    "bleu": ("Corpus BLEU of all answers, 0 to 100, as sacrebleu computes it.", Bleu, "overlap:BleuMetric"),
    "rouge": ("Mean F-measure of the overlap, as rouge-score computes it.", Rouge, "overlap:RougeMetric"),
    "pass_at_k": ("Probability that one of k drawn answers is right.", PassAtK, "matching:PassAtKMetric"),
    "custom": ("Mean of a function of yours over answers and references.", Custom, "matching:CustomMetric"),
}
