"""Metrics that count overlaps of an answer with its reference, by sacrebleu and rouge-score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier_metrics import Bleu, Rouge


class BleuMetric:
    """The BLEU of all answers together: matching and possible n-grams are added up before the division.

    The statistics of an answer are 4 counts of matches, 4 counts of n-grams, its length and the reference's.
    """

    def __init__(self, options: Bleu) -> None:
        from sacrebleu.metrics import BLEU

        self.options = options
        self.scorer: Any = BLEU(
            tokenize=options.tokenize,
            lowercase=options.lowercase,
            smooth_method=options.smooth_method,
            effective_order=True,
        )

    def score_answers(self, predictions: Sequence[str], reference: str) -> list[float]:
        """Return the statistics of the answer."""
        bleu = self.scorer.sentence_score(predictions[0], [reference])
        return [*map(float, bleu.counts), *map(float, bleu.totals), float(bleu.sys_len), float(bleu.ref_len)]

    def conclude(self, totals: Sequence[float]) -> float:
        """Return the BLEU of the added statistics."""
        size = (len(totals) - 2) // 2
        whole = [round(number) for number in totals]
        bleu = self.scorer.compute_bleu(
            correct=whole[:size],
            total=whole[size : 2 * size],
            sys_len=whole[-2],
            ref_len=whole[-1],
            smooth_method=self.options.smooth_method,
        )
        return float(bleu.score)


class RougeMetric:
    """The mean F-measure of the answers."""

    def __init__(self, options: Rouge) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        self.kind = options.kind
        self.scorer: Any = RougeScorer([options.kind], use_stemmer=options.use_stemmer)

    def score_answer(self, prediction: str, reference: str) -> tuple[float, float]:
        """Return (the F-measure, 1)."""
        return float(self.scorer.score(reference, prediction)[self.kind].fmeasure), 1.0
