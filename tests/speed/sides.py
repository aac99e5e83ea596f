"""Side: a process that does one side's work, one turn at a time, so that two sides share whatever the machine does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


class Side:
    """A worker process on `tests.speed.<case>:<function>`; each turn runs until it asks for the next."""

    def __init__(self, target: str, settings: dict[str, Any], threads: int) -> None:
        variables = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.speed.worker", target, json.dumps(settings)],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": {**os.environ, **variables}},
        )
        self.turns: list[dict[str, float]] = []
        self.ready = self._answer()

    def turn(self) -> dict[str, float]:
        """Let the side do one turn: {wall, cpu} in seconds, and what it says of its work."""
        self._tell("go")
        self.turns.append(self._answer())
        return self.turns[-1]

    def end(self) -> dict[str, Any]:
        """Stop after the last turn; the side's closing numbers."""
        self._tell("end")
        closing = self._answer()
        self.process.wait()
        return closing

    def _tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended early with status {self.process.wait()}; its messages are above")
        return json.loads(line)


def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
