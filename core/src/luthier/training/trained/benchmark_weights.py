"""Benchmarks of trained weights: the model of a place, as it answers, over the tasks of a plugin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from luthier.errors import LuthierError
from luthier.hardware.devices import choose_device
from luthier.model.benchmark_model import BenchmarkModel
from luthier.plugins.contracts.side_protocols import Benchmark
from luthier.plugins.contracts.values import BenchmarkScore
from luthier.plugins.registry import installed_plugins
from luthier.recipe import Recipe
from luthier.recipe.parts import find_part
from luthier.training.trained.open_weights import open_weights
from luthier.training.trained.weights_place import WeightsPlace, run_recipe

TOKENS: Final = 8192  # of one pass, where the run's own bound was found by trying


def find_benchmark(chosen: Any, tasks: Sequence[str]) -> Benchmark:
    """Return the benchmark of this name, or of `{name: ..., options}`, once it has said that it has these tasks."""
    part = find_part(chosen, "benchmark", "--benchmark", installed_plugins())
    benchmark: Benchmark = installed_plugins().build(part.offer, part.options) if part.offer else part.local
    benchmark.check(tasks)
    return benchmark


def run_benchmark(
    place: WeightsPlace, benchmark: Benchmark, tasks: Sequence[str], device: str | None
) -> dict[str, BenchmarkScore]:
    """Return the numbers of the tasks by `task/metric`, of the weights of a place as `generate` opens them."""
    recipe = Recipe.from_dict({"model": "demo", "data": "none"}) if place.run is None else run_recipe(place.run)
    opened = open_weights(place, choose_device(device or recipe.device))
    asked = recipe.max_tokens_per_device
    model = BenchmarkModel(model=opened.model, tokenizer=opened.tokenizer, adapter=opened.adapter, seed=recipe.seed,
                           max_tokens=asked if isinstance(asked, int) else TOKENS)  # fmt: skip
    scores = {f"{score.task}/{score.metric}": score for score in benchmark.run(model, tasks)}
    _check_scores(scores)
    return scores


def _check_scores(scores: Mapping[str, BenchmarkScore]) -> None:
    for name, score in scores.items():
        if not math.isfinite(score.value) or (score.stderr is not None and not score.stderr >= 0):
            raise LuthierError("part-invalid", "a benchmark gives finite numbers, and errors of 0 or more", where=name,
                               found=score)  # fmt: skip
    if not scores:
        raise LuthierError("part-invalid", "a benchmark gives at least one number", where="--tasks")
