"""`python -m tests.speed CASE`: run one benchmark and print its rows as a table, or as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

CASES = tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "\ndef cases(" in p.read_text("utf-8")))


def main() -> None:
    """Parse the case and its own options, run it, print what it found."""
    parser = argparse.ArgumentParser(prog="python -m tests.speed", description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine with other work")
    parser.add_argument("--rounds", type=int, default=0, help="measured rounds of each side; 0: the case's own")
    parser.add_argument("--json", action="store_true")
    given, _ = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # before torch is imported, here and in the sides
    module = importlib.import_module(f"tests.speed.{given.case}")
    module.options(parser)
    arguments = parser.parse_args()
    rows = [row.to_dict() for row in module.cases(arguments)]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    from tests.speed.table import draw

    draw(rows, sys.stdout)


if __name__ == "__main__":
    main()
