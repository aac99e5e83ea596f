"""OSFT: a step of each form beside full training and beside PEFT's OSF, and the preparation of a weight."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from tests.speed.sides import Side, median
from tests.speed.table import Row

WARM, ROUNDS = 2, 6
FULL: dict[str, Any] = {"adapter": "full", "learning_rate": 3e-4}
CORE: dict[str, Any] = {"adapter": {"name": "osft", "unfreeze_rank_ratio": 0.25}, "learning_rate": 3e-3}
FACTORED: dict[str, Any] = {"adapter": {**CORE["adapter"], "form": "factored"}, "learning_rate": 3e-4}
PEFT: dict[str, Any] = {"adapter": {"name": "peft.osf", "effective_rank": 0.75}, "learning_rate": 3e-4}
PAIRS = {
    "core step beside full": (CORE, FULL),
    "factored step beside full": (FACTORED, FULL),
    "factored step beside PEFT's OSF": (FACTORED, PEFT),
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--size", type=int, default=2048, help="of the square weight that is decomposed")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--only", default="", help="cases whose name has this in it")


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    for name, pair in PAIRS.items():
        if arguments.only in name:
            yield _steps(name, pair, arguments)
    if arguments.only in "preparation":
        yield _preparation(arguments.size, arguments.rounds or 2)


def _steps(name: str, pair: tuple[dict[str, Any], dict[str, Any]], arguments: argparse.Namespace) -> Row:
    """Compare the steps of two methods.

    `trained_share` is the number of trained parameters over that of all parameters of the model with its adapter, as a
    step finds them. The frozen bases and first triplets of OSFT count among all, so that its share is below trained over
    base parameters. PEFT's are buffers and do not count.
    """
    shared = {"vocabulary": arguments.vocabulary, "global_batch_size": arguments.batch}
    sides = [Side("methods:train", {**method, **shared}, arguments.threads) for method in pair]
    for _ in range(WARM + (arguments.rounds or ROUNDS)):
        for side in sides:
            side.turn()
    rates = [median([t["tokens"] / t[arguments.clock] for t in side.turns[WARM:]]) for side in sides]
    own, peer = (side.end() for side in sides)
    figures = {"memory": "whole_peak", "activations": "kept"}
    memory = {f"{whose}{figure}_mib": side[name] / 2**20 for figure, name in figures.items()
              for whose, side in (("", own), ("peer_", peer))}  # fmt: skip
    more = {**memory, "trained_share": own["share"], "peer_trained_share": peer["share"]}
    return Row.rate(name, *rates, "tokens/s", more=more)


def _preparation(size: int, rounds: int) -> Row:
    """The bases of a square weight beside torch's full decomposition of it, in seconds of this process."""
    import torch
    from luthier_osft.decompose import decompose

    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    ours, peer = [], []
    for _ in range(rounds):
        for times, work in ((ours, lambda: decompose(weight, size * 3 // 4)), (peer, lambda: torch.linalg.svd(weight))):
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
    return Row.cost(f"preparation of {size} x {size}", median(ours), median(peer), "s")
