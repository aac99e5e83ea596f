"""LoRA: a training step beside PEFT's layers at their defaults, in our own engine, on a bfloat16 and a float32 base."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from tests.speed.sides import Side, median
from tests.speed.table import Row

WARM, ROUNDS = 3, 8
SHARED = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
LENGTHS = (128, 512)  # tokens of a step


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, help="of a step, which is one row")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], help="of the base's weights")


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    return compare_layers("lora", {}, arguments)


def compare_layers(name: str, peer_options: dict[str, Any], arguments: argparse.Namespace) -> Iterator[Row]:
    """Measure our adapter of a name and PEFT's LoRA with some options in turn, for each length and dtype."""
    peer = {"name": "peft.lora", **SHARED, **peer_options}
    for dtype in arguments.dtype:
        for tokens in arguments.tokens:
            shared = {"vocabulary": arguments.vocabulary, "dtype": dtype, "sequence": tokens, "global_batch_size": 1,
                      "learning_rate": 1e-4, "packing": False}  # fmt: skip
            sides = [Side("methods:train", {**shared, "adapter": adapter}, arguments.threads)
                     for adapter in ({"name": name, **SHARED}, peer)]  # fmt: skip
            for _ in range(WARM + (arguments.rounds or ROUNDS)):
                for side in sides:
                    side.turn()
            rates = [median([t["tokens"] / t[arguments.clock] for t in side.turns[WARM:]]) for side in sides]
            ours, theirs = (side.end() for side in sides)
            more = {}
            for figure, name_of in (("memory", "whole_peak"), ("activations", "kept")):
                own, other = ours[name_of] / 2**20, theirs[name_of] / 2**20
                more |= {f"{figure}_mib": own, f"peer_{figure}_mib": other, f"{figure}_ratio": own / other}
            yield Row.rate(f"{name} step, {tokens} tokens, {dtype} base", *rates, "tokens/s", more=more)
