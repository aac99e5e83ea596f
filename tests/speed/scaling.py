"""Two processes against one: the same run by `luthier train --nproc-per-node`, its tokens a second and its losses."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.speed.sides import median
from tests.speed.table import Row

STEPS = 10
WARM = 3  # steps that are not counted
ROUNDS = 2
CASES = {
    "lora, ddp": {"adapter": {"name": "lora", "lora_dropout": 0.0}, "distributed": "ddp"},
    "full, ddp": {"adapter": "full", "distributed": "ddp"},
    "full, fsdp": {"adapter": "full", "distributed": "fsdp"},
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=2048, help="of a micro-batch")


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    """`ours` is so many processes, `peer` one with as many threads as each of them; a ratio of 2 would be perfect.

    The clock is the wall's: what processes wait for each other is what is asked.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_work(folder, arguments)
        for case, settings in CASES.items():
            speeds: dict[int, list[float]] = {1: [], arguments.processes: []}
            losses: dict[int, float] = {}
            for turn in range(arguments.rounds or ROUNDS):
                for count, found in speeds.items():
                    lines = _run(folder, settings, count, f"{case}-{count}-{turn}".replace(", ", "-"), arguments)
                    found.append(median([line["tokens_per_second"] for line in lines[WARM:]]))
                    losses[count] = lines[-1]["loss"]
            ours, peer = (max(speeds[count]) for count in (arguments.processes, 1))
            difference = losses[arguments.processes] - losses[1]
            about = {"threads": arguments.threads, "cores": os.cpu_count(), "hidden": arguments.hidden}
            yield Row.rate(f"{case}, {arguments.processes} processes against 1", ours, peer, "tokens/s",
                           loss_difference=difference, more=about)  # fmt: skip


def _write_work(folder: Path, arguments: argparse.Namespace) -> None:
    """A model, its tokenizer and rows, as a recipe names them."""
    from tests.speed.work import llama, token_rows, tokenizer

    inner = arguments.hidden * 5 // 2
    llama(8192, hidden=arguments.hidden, layers=arguments.layers, inner=inner).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    lines = [json.dumps(row) for row in token_rows(400)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")


def _run(
    folder: Path, settings: dict[str, Any], count: int, name: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The metrics of each step of a run in `count` processes."""
    recipe = {
        **{"model": str(folder / "model"), "data": {"train": str(folder / "rows.jsonl"), "format": "tokens"}},
        **{"global_batch_size": 32, "max_tokens_per_device": arguments.max_tokens, "max_steps": STEPS, "seed": 0},
        **{"num_threads": arguments.threads, "precision": "float32", "exact_callbacks": ["jsonl"], "save_final": False},
        **{"output_dir": str(folder / name), "learning_rate": 1e-3, **settings},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    words = [str(folder / "recipe.json"), "--nproc-per-node", str(count), "--log-level", "error"]
    subprocess.run([sys.executable, "-m", "luthier", "train", *words], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text("utf-8").splitlines()]
