"""Packing 50,000 lengths: time, and how full the rows are, against TRL's `bfd`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.speed.sides import median
from tests.speed.table import Row

ROUNDS = 5
COUNT, LIMIT = 50_000, 4096


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", choices=("trl",), default="trl")


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    from datasets import Dataset, disable_progress_bars
    from luthier.data.batches.packing import pack
    from trl import pack_dataset

    disable_progress_bars()
    for name, lengths in _shapes().items():
        rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
        seconds: dict[str, list[float]] = {"ours": [], "trl": []}
        for _ in range(arguments.rounds or ROUNDS):
            mine = _timed(seconds["ours"], lambda lengths=lengths: pack(lengths, LIMIT))
            theirs = _timed(seconds["trl"], lambda rows=rows: pack_dataset(rows, LIMIT, "bfd"))
        full = sum(lengths) / LIMIT
        more = {"fill_ours": full / len(mine), "fill_peer": full / len(theirs), "rows_ours": len(mine)}
        more["rows_peer"] = len(theirs)
        yield Row.cost(f"packing {name}", *(median(seconds[side]) for side in ("ours", "trl")), "s", more=more)


def _shapes() -> dict[str, list[int]]:
    import numpy as np

    random = np.random.default_rng(0)
    short, long = random.integers(50, 300, COUNT), random.integers(2000, 4000, COUNT)
    return {
        "uniform": random.integers(16, LIMIT, COUNT).tolist(),
        "bimodal": np.where(random.random(COUNT) < 0.8, short, long).tolist(),
        "log-normal": np.clip(random.lognormal(6, 0.8, COUNT), 8, LIMIT).astype(int).tolist(),
    }


def _timed(into: list[float], work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = work()
    into.append(time.perf_counter() - began)
    return result
