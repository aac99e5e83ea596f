"""Metrics: two that are sound, and those that break one rule each."""

from __future__ import annotations

from typing import Any

from luthier import TokenStatistics


class Exact:
    def __init__(self, options: Any) -> None:
        self.seen = 0

    def score_answer(self, prediction: str, reference: str) -> tuple[float, float]:
        return float(prediction == reference), 1.0


class CountsNothing(Exact):
    def score_answer(self, prediction, reference):
        return 0.0, 0.0


class GivesNaN(Exact):
    def score_answer(self, prediction, reference):
        return (len(prediction) / len(reference) if reference else float("nan")), 1.0


class Remembers(Exact):
    def score_answer(self, prediction, reference):
        self.seen += 1
        return float(self.seen), 1.0


class UnevenStatistics(Exact):
    def score_answers(self, predictions, reference):
        return [1.0] * (1 + len(predictions[0]))

    def conclude(self, totals):
        return sum(totals)


class ConcludesNothing(UnevenStatistics):
    def score_answers(self, predictions, reference):
        return [float(predictions[0] == reference), 1.0, 0.0]

    def conclude(self, totals):
        return float("inf")


class Surprise:
    def __init__(self, options: Any) -> None:
        pass

    def score_tokens(self, statistics: TokenStatistics) -> tuple[float, float]:
        return float(-(statistics.logprobs * statistics.weights).sum()), float(statistics.weights.sum())


class MeanOfTokens(Surprise):
    def score_tokens(self, statistics):
        return float(-statistics.logprobs.mean()), 1.0
