"""Whole steps of DPO with LoRA on real pairs, against TRL's trainer at the best of its settings."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from tests.speed.pairs import compare_pairs, pair_options
from tests.speed.table import Row


def options(parser: argparse.ArgumentParser) -> None:
    pair_options(parser)


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    yield from compare_pairs("dpo", arguments)
