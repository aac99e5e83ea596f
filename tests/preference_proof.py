"""`python -m tests.preference_proof`: recipes on real pairs, held-out accuracy before and after, with an interval.

PandaLM's pairs without repetitions are divided into rows to train on and rows held out: none of the latter is among the
former (`--apart pair`), or not even its prompt is (`--apart prompt`). Each recipe trains as it stands in docs/recipes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

import luthier

RECIPES = Path(__file__).resolve().parents[1] / "docs" / "recipes"
ACCURACY = "eval_rewards/accuracies"


def main() -> None:
    """Train each recipe with each seed, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=["dpo", "orpo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--apart", choices=("pair", "prompt"), default="pair")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the pairs, or of the prompts")
    parser.add_argument("--max-steps", type=int, help="another number of steps than the recipe's")
    given = parser.parse_args()
    rows = distinct_pairs(Path(os.environ["LUTHIER_DATA"]) / "pandalm" / "derived_pairs.jsonl")
    for recipe in given.recipes:
        for seed in given.seeds:
            with tempfile.TemporaryDirectory() as folder:
                kept, held = divide(rows, given.apart, given.held_out, seed)
                print(json.dumps(prove(recipe, seed, kept, held, Path(folder), given.max_steps)), flush=True)


def distinct_pairs(path: Path) -> list[dict[str, str]]:
    """Return the pairs of a file, each once, whatever order its answers were given in."""
    found: dict[tuple[str, frozenset[str]], dict[str, str]] = {}
    for line in path.read_text("utf-8").splitlines():
        row = {name: str(json.loads(line)[name]) for name in ("prompt", "chosen", "rejected")}
        found.setdefault((row["prompt"], frozenset((row["chosen"], row["rejected"]))), row)
    return [row for (_, answers), row in found.items() if len(answers) == 2]


def divide(
    rows: list[dict[str, str]], apart: str, share: float, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return rows to train on and rows held out, which share no pair, or no prompt."""
    groups = sorted({row["prompt"] for row in rows}) if apart == "prompt" else list(range(len(rows)))
    chosen = set(random.Random(seed).sample(groups, round(share * len(groups))))
    held = [(row["prompt"] if apart == "prompt" else i) in chosen for i, row in enumerate(rows)]
    return ([row for row, out in zip(rows, held, strict=True) if not out],
            [row for row, out in zip(rows, held, strict=True) if out])  # fmt: skip


def prove(
    recipe: str, seed: int, kept: list[dict[str, str]], held: list[dict[str, str]], folder: Path, steps: int | None
) -> dict[str, object]:
    """Return the accuracy over the rows held out, before the first step and after the last, with its interval."""
    for name, rows in (("train", kept), ("held", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    more = {} if steps is None else {"max_steps": steps}
    began = time.process_time()
    run = luthier.train(
        RECIPES / f"{recipe}.yaml",
        data={"train": [{"path": str(folder / "train.jsonl")}], "validation": [{"path": str(folder / "held.jsonl")}],
              "max_length": 512},
        output_dir=folder / "run", seed=seed, callbacks=["jsonl"], **more,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run.output_path / "metrics.jsonl").read_text().splitlines()]
    found = luthier.evaluate(run.output_path).metrics[ACCURACY]
    return {
        **{"recipe": recipe, "seed": seed, "steps": run.steps, "pairs": len(kept), "held_out": len(held)},
        **{"before": next(line[ACCURACY] for line in lines if ACCURACY in line), "after": found.value},
        **{"low": found.low, "high": found.high, "cpu_seconds": round(time.process_time() - began)},
    }


if __name__ == "__main__":
    main()
