"""DoRA: a training step beside PEFT's layers at their defaults, in our own engine; see the case `lora`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from tests.speed import lora
from tests.speed.table import Row

options = lora.options


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    return lora.compare_layers("dora", {"use_dora": True}, arguments)
