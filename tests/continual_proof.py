"""`python -m tests.continual_proof`: five tasks one after the other by every method, and what each has forgotten.

Each method trains `docs/recipes/five_tasks.yaml` with each seed in a process of its own, so that its memory is its own.
A line for each run is JSON; the last lines have the numbers of the table in `docs/continual-learning.md`. `--rates` tries other learning
rates than each method's own. All of it takes about 25 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import luthier

RECIPE: Final = Path(__file__).resolve().parents[1] / "docs" / "recipes" / "five_tasks.yaml"
LOSS, ACCURACY = "eval_loss", "eval_accuracy"


@attrs.frozen(kw_only=True)
class Method:
    """A row of the table: the adapter with its options, and its learning rate."""

    adapter: str | dict[str, Any]
    learning_rate: float


LOW_RANK: Final = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
METHODS: Final = {
    "full": Method(adapter="full", learning_rate=1e-3),
    "lora": Method(adapter={"name": "lora", **LOW_RANK}, learning_rate=3e-3),
    "slao": Method(adapter={"name": "slao", **LOW_RANK}, learning_rate=3e-3),
    "peft.osf": Method(adapter={"name": "peft.osf", "target_modules": "all-linear"}, learning_rate=1e-3),
    "osft core": Method(adapter={"name": "osft", "unfreeze_rank_ratio": 0.5}, learning_rate=3e-3),
    "osft factored": Method(
        adapter={"name": "osft", "unfreeze_rank_ratio": 0.5, "form": "factored"}, learning_rate=1e-3
    ),
}


def main() -> None:
    """Train each method with each seed, print a line for each, and then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", help="other learning rates than each method's own")
    parser.add_argument("--one", action="store_true", help="one method, one seed and one rate, in this process")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.methods[0], given.seeds[0], given.rates[0])))
        return
    lines = []
    for seed in given.seeds:
        for method in given.methods:
            for rate in given.rates or [METHODS[method].learning_rate]:
                lines.append(in_own_process(method, seed, rate))
                print(json.dumps(lines[-1]), flush=True)
    print("\n".join(format_table(lines)))


def in_own_process(method: str, seed: int, rate: float) -> dict[str, Any]:
    """Return what `measure` finds in a process of its own."""
    words = [sys.executable, "-m", "tests.continual_proof", method, "--seeds", str(seed), "--rates", str(rate), "--one"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=RECIPE.parents[2], check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(method: str, seed: int, rate: float) -> dict[str, Any]:
    """Train the five tasks; memory is the peak of the process above what it held before."""
    import torch

    torch.set_num_threads(1)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        report = luthier.continual(RECIPE, output_dir=folder, adapter=METHODS[method].adapter, learning_rate=rate,
                                   seed=seed, eval_base=False, callbacks=["jsonl"])  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accuracies, losses = report.metrics[ACCURACY], report.metrics[LOSS]
    return {
        "method": method,
        "seed": seed,
        "learning_rate": rate,
        "new_loss": mean_of(losses[i][i] for i in range(len(losses))),
        "new_accuracy": mean_of(accuracies[i][i] for i in range(len(accuracies))),
        "accuracy": report.transfer(ACCURACY).average,
        "backward": report.transfer(ACCURACY).backward,
        "loss": report.transfer(LOSS).average,
        "backward_loss": report.transfer(LOSS).backward,
        "cpu_seconds": time.process_time() - began,
        "train_seconds": sum(report.seconds),
        "megabytes": (peak - before) / 1024,
        "accuracies": accuracies,
    }


def mean_of(values: Iterable[float]) -> float:
    """Return the mean as a float."""
    return float(statistics.fmean(values))


COLUMNS: Final = {
    "new_loss": "loss of new tasks",
    "new_accuracy": "accuracy of new tasks",
    "accuracy": "accuracy at the end",
    "backward": "backward transfer",
    "backward_loss": "the same of the loss",
    "cpu_seconds": "CPU s",
    "megabytes": "MB",
}


def format_table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return Markdown: the mean over the seeds and, behind ±, the standard deviation."""
    rows = ["| method | rate | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for method, rate in dict.fromkeys((line["method"], line["learning_rate"]) for line in lines):
        own = [line for line in lines if (line["method"], line["learning_rate"]) == (method, rate)]
        cells = [_cell(name, [line[name] for line in own]) for name in COLUMNS]
        rows.append(f"| `{method}` | {rate:g} | " + " | ".join(cells) + " |")
    return rows


def _cell(name: str, values: Sequence[float]) -> str:
    if name in ("cpu_seconds", "megabytes"):
        return f"{statistics.fmean(values):.0f}"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
