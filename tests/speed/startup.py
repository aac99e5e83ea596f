"""From the command to the first step: LoRA on the embedded model, `luthier train` against `trl sft`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.speed.sides import median
from tests.speed.table import Row

ROUNDS = 3
ROWS = 256


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", choices=("trl",), default="trl")


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    found: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        _write_rows(Path(folder) / "data" / "rows.jsonl")
        for number in range(arguments.rounds or ROUNDS):
            found["ours"].append(_ours(folder, number))
            found["trl"].append(_trl(folder, number))
    mine, peer = (median([turn[arguments.clock] for turn in found[side]]) for side in ("ours", "trl"))
    losses = [found[side][0]["loss"] for side in ("ours", "trl")]
    more = {"clock": arguments.clock, "threads": arguments.threads}
    difference = losses[0] - losses[1]
    yield Row.cost("startup lora, embedded model", mine, peer, "s to first step", loss_difference=difference, more=more)


def _write_rows(path: Path) -> None:
    from tests.speed.work import token_rows

    rows = token_rows(ROWS)
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _ours(folder: str, number: int) -> dict[str, float]:
    settings = {"model": "demo", "data": f"{folder}/data/rows.jsonl", "adapter": "lora", "adapter.r": "16"}
    settings |= {"output-dir": f"{folder}/ours-{number}", "max-steps": "1000", "global-batch-size": "16"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    metrics = Path(settings["output-dir"]) / "metrics.jsonl"

    def loss() -> float | None:
        text = metrics.read_text("utf-8") if metrics.is_file() else ""
        return json.loads(text.splitlines()[0])["loss"] if "\n" in text else None

    return _until([sys.executable, "-m", "luthier", "train", *flags], loss, Path(f"{folder}/ours-{number}.log"))


def _trl(folder: str, number: int) -> dict[str, float]:
    from luthier.demo import MODEL

    settings = {
        "model_name_or_path": str(MODEL),
        "dataset_name": f"{folder}/data",
        "output_dir": f"{folder}/trl-{number}",
    }
    settings |= {"use_peft": "true", "lora_r": "16", "lora_alpha": "16", "per_device_train_batch_size": "16"}
    settings |= {"max_steps": "1000", "logging_steps": "1", "report_to": "none", "use_cpu": "true", "bf16": "false"}
    settings |= {"gradient_checkpointing": "false", "save_strategy": "no", "learning_rate": "2e-4"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    output = Path(f"{folder}/trl-{number}.log")

    def loss() -> float | None:
        found = re.search(r"'loss': '?([\d.]+)", output.read_text("utf-8", "replace"))
        return float(found[1]) if found else None

    return _until([str(Path(sys.executable).with_name("trl")), "sft", *flags], loss, output)


def _until(command: list[str], loss: Callable[[], float | None], output: Path) -> dict[str, float]:
    """Start the command, wait until its first loss is known, and end it: seconds by the clock and of the processor."""
    caches = {"HF_DATASETS_CACHE": f"{output}.cache", "XDG_CACHE_HOME": f"{output}.cache"}  # each begins with none
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **caches}
    began = time.perf_counter()
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=variables, start_new_session=True)
    try:
        while (first := loss()) is None:
            if process.poll() is not None:
                raise RuntimeError(f"{command[:3]} ended before its first step:\n{output.read_text()[-2000:]}")
            time.sleep(0.005)
        return {"wall": time.perf_counter() - began, "cpu": _processor_seconds(process.pid), "loss": first}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _processor_seconds(session: int) -> float:
    """Seconds of the processor of every process of a session, and of those that they have waited for."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += sum(int(number) for number in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")
