"""The worker's end of a `Side`: a gate between turns, its clocks, and the memory above what stood at the start."""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

FIRST = 3  # turns whose peak memory counts


class Gate:
    """Between turns the worker waits here. `arrive` ends the turn that runs and returns False when all is done."""

    def __init__(self, answers: TextIO) -> None:
        self.answers = answers
        self.began: tuple[float, float] | None = None
        self.base = self.first_peak = self.turns = 0

    def baseline(self) -> None:
        """From here on memory counts: what is resident now is the model's own, and the libraries'."""
        self.base = _resident("VmRSS")
        if Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        if sys.modules["torch"].cuda.is_initialized():
            sys.modules["torch"].cuda.reset_peak_memory_stats()

    def arrive(self, **said: float) -> bool:
        """End the turn that runs, if one does, and wait for the next."""
        if self.began is None:
            self._answer({"ready": 1.0})
        else:
            wall, cpu = self.began
            self.turns += 1
            if self.turns == FIRST:
                self.first_peak = _resident("VmHWM") - self.base
            self._answer({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, **said})
        if sys.stdin.readline().strip() != "go":
            return False
        self.began = time.perf_counter(), time.process_time()
        return True

    def close(self, **said: Any) -> None:
        self._answer({"first_peak": self.first_peak, "whole_peak": _resident("VmHWM") - self.base, **said})

    def _answer(self, answer: dict[str, Any]) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()


def _resident(name: str) -> int:
    """Bytes, of this process or on its GPU where it computes there: VmRSS now, VmHWM at the most."""
    torch = sys.modules["torch"]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated() if name == "VmRSS" else torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1]) * 1024


def main() -> None:
    target, settings = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module, _, function = target.partition(":")
    getattr(importlib.import_module(f"tests.speed.{module}"), function)(Gate(answers), settings)


if __name__ == "__main__":
    main()
