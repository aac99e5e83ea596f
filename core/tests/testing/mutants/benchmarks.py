"""Benchmarks: one that is sound, and those that break one rule each."""

from __future__ import annotations

import math
from typing import Any

import attrs
from luthier import BenchmarkScore, LuthierError


class Letters:
    """It asks for each letter of the alphabet after those before it."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def check(self, tasks):
        for task in tasks:
            if task != "letters":
                raise LuthierError("part-unknown", f"there is no task {task!r}", where="--tasks")

    def run(self, model, tasks):
        text = "abcdefghijklmnopqrstuvwxyz"[: self.options.letters]
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        scores = model.score_tokens([(ids[:i], ids[i : i + 1]) for i in range(1, len(ids))])
        mean = sum(score for score, _ in scores) / len(scores)
        return [BenchmarkScore(task="letters", metric="nats", value=mean, samples=len(scores))]


class GivesNothing(Letters):
    def run(self, model, tasks):
        return []


class Changed(Letters):
    changes: dict[str, Any] = {}

    def run(self, model, tasks):
        return [attrs.evolve(score, **self.changes) for score in super().run(model, tasks)]


class GivesNaN(Changed):
    changes = {"value": math.nan}


class CountsNone(Changed):
    changes = {"samples": 0}


class KnowsTheAnswer(Changed):
    changes = {"value": 1.0}


class NamesTwice(Letters):
    def run(self, model, tasks):
        return super().run(model, tasks) * 2


class TakesAnyTask(Letters):
    def check(self, tasks):
        pass


class CountsRuns(Letters):
    runs = 0

    def run(self, model, tasks):
        self.runs += 1
        return [attrs.evolve(score, value=score.value + self.runs) for score in super().run(model, tasks)]


class Forgets(Letters):
    def run(self, model, tasks):
        scores = super().run(model, tasks)
        for weight in model.model.parameters():
            weight.data.zero_()
        return scores


class Trains(Letters):
    def run(self, model, tasks):
        scores = super().run(model, tasks)
        model.model.train()
        return scores
