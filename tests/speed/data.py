"""Preparing chat rows: rows of a JSONL file into token examples, beside `datasets.map` as TRL uses it; tokens compared."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tests.speed.table import Row

WORDS: Final = (
    "the", "a", "of", "model", "gradient", "token", "batch", "learning", "rate", "loss",
    "data", "file", "run", "step", "weight", "answer", "question", "is", "not",
)  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=20_000, help="chat rows of about 300 bytes")
    parser.add_argument("--processes", type=int, default=2, help="that tokenise")
    parser.add_argument("--peer", choices=("trl", "none"), default="trl", help="none: Luthier alone")


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, arguments.rows)
        compared = ("ours",) if arguments.peer == "none" else ("ours", "trl")
        found = {side: _apart(side, path, arguments.processes) for side in compared}
    clock, sides = arguments.clock, [side for side in ("ours", "trl") if side in found]
    more = {f"{name}_{side}": found[side][name] for side in sides for name in ("wall", "cpu", "peak_mb", "tree_mb")}
    if "trl" in found:
        more["same_tokens"] = found["ours"]["tokens"] == found["trl"]["tokens"]
    case, unit = f"data, {arguments.rows:,} chat rows", f"rows/s ({clock})"
    ours, *peer = [arguments.rows / found[side][clock] for side in sides]
    if not peer:
        yield Row(case=case, ours=ours, peer=None, unit=unit, ratio=None, more=more)
    else:
        yield Row.rate(case, ours, peer[0], unit, more=more)


def write_rows(path: Path, count: int) -> None:
    """Write conversations of one question and one answer; no two are alike."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            said = [" ".join(draw.choices(WORDS, k=k)) + f" {number}" for k in (16, 24)]
            roles = zip(("user", "assistant"), said, strict=True)
            row = {"messages": [{"role": role, "content": content} for role, content in roles]}
            file.write(json.dumps(row) + "\n")


def _apart(side: str, path: Path, processes: int) -> dict[str, Any]:
    """What a side takes in a process of its own, those that it starts counted."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        task, tree = pool.submit(_measured, side, str(path), processes), 0.0
        while not task.done():
            tree = max(tree, _tree_mb())
            wait([task], timeout=0.1)
        return {**task.result(), "tree_mb": tree}


def _tree_mb() -> float:
    """MiB of resident memory of all processes below this one. Pages that two of them share are counted twice."""
    import psutil

    total = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            total += child.memory_info().rss
    return total / (1 << 20)


def _measured(side: str, path: str, processes: int) -> dict[str, Any]:
    import numpy as np
    from luthier.model.load import tokenizer_of
    from luthier.recipe.schema import Model

    tokenizer = tokenizer_of(Model(name_or_path="demo"))
    wall, cpu = time.perf_counter(), _cpu()
    with tempfile.TemporaryDirectory() as cache:
        prepared = _ours(path, tokenizer, processes) if side == "ours" else _trl(path, tokenizer, processes, cache)
        wall, cpu = time.perf_counter() - wall, _cpu() - cpu
        digest = hashlib.sha256()
        for ids in prepared:
            tokens = np.asarray(ids, np.int32)
            digest.update(len(tokens).to_bytes(8, "big") + tokens.tobytes())
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    return {"wall": wall, "cpu": cpu, "peak_mb": peak, "tokens": digest.hexdigest()}


def _cpu() -> float:
    """Seconds of processor time of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _ours(path: str, tokenizer: Any, processes: int) -> Any:
    from luthier.data.prepare import prepare_data
    from luthier.recipe.schema import Data, Source

    data = Data(train=[Source(path=path)], num_proc=processes, cache=False)
    return (example.input_ids for example in prepare_data(data, tokenizer, seed=0).train)


def _trl(path: str, tokenizer: Any, processes: int, cache: str) -> Any:
    """One call of the template a row, text and assistant's mask apart, as TRL's SFTTrainer maps its data set."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_json(path, cache_dir=cache)

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]}

    made = rows.map(tokenise, num_proc=processes, remove_columns=rows.column_names)
    return (row["input_ids"] for row in made)
