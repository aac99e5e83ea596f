"""What a checkpoint costs the training: in the background, written at once, and by `torch.save`; and coming back."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.speed.table import Row

ROUNDS = 8
STEPS = 12  # of training after each checkpoint, in which what runs in the background may cost something


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=float, default=100.0, help="weights and both moments of AdamW")


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    """`ours` is the background; the peers write at once. `cpu` is the training thread's own time."""
    training = Training(arguments.megabytes)
    stands, after, loads = _measured(training, arguments)
    about = {"clock": arguments.clock, "threads": arguments.threads}
    about |= {f"{name}_per_step_ms": 1e3 * seconds for name, seconds in after.items()}
    size = f"checkpoint {arguments.megabytes:g} MB"
    for mine, peer in (("background", "at_once"), ("background", "torch_save"), ("at_once", "torch_save")):
        numbers = (1e3 * stands[mine], 1e3 * stands[peer])
        yield Row.cost(f"{size}, {mine} against {peer}", *numbers, "ms that training stands still", more=about)
        about = {}
    numbers = (1e3 * loads["ours"], 1e3 * loads["torch_load"])
    yield Row.cost(f"{size}, read, checked and put back against torch_load", *numbers, "ms")


class Training:
    """Steps of AdamW over so many megabytes of weights and moments, with products before each."""

    def __init__(self, megabytes: float) -> None:
        import torch

        rows = round(megabytes * 1e6 / 12 / 1024 / 16)
        self.weights = [torch.nn.Parameter(torch.randn(rows, 1024) / 32) for _ in range(16)]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, fused=True)
        self.inputs = torch.randn(32, 1024)
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        sum((self.inputs @ weight.T).square().mean() for weight in self.weights).backward()
        self.optimizer.step()

    def tree(self) -> dict[str, Any]:
        from luthier.state_tree import optimizer_state

        return {
            "adapter": {str(i): w for i, w in enumerate(self.weights)},
            "optimizer": optimizer_state(self.optimizer),
        }


def _measured(training: Training, arguments: argparse.Namespace) -> tuple[dict[str, float], ...]:
    """Seconds in which training stands still, those of a step afterwards, and those to come back.

    The sides take turns, and of each the least disturbed round counts.
    """
    from luthier.checkpoint.saver import Saver

    clock = time.perf_counter if arguments.clock == "wall" else time.thread_time
    with tempfile.TemporaryDirectory() as folder:
        savers = {name: Saver(Path(folder) / name, {}, background=name == "background", limit=1)
                  for name in ("background", "at_once")}  # fmt: skip
        sides = {"nothing": lambda: None, "torch_save": lambda: _torch_save(training.tree(), Path(folder) / "torch.pt")}
        sides |= {name: _by(saver, training) for name, saver in savers.items()}
        spans: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(1 + (arguments.rounds or ROUNDS)):
            for name, save in sides.items():
                spans[name].append(_span(training, save, clock))
                for saver in savers.values():
                    saver.wait()
        loads = _loads(training, Path(folder), clock)
    stands, after = ({name: min(span[i] for span in times[1:]) for name, times in spans.items()} for i in (0, 1))
    return stands, after, loads


def _by(saver: Any, training: Training) -> Callable[[], None]:
    steps = iter(range(1, 10**6))
    return lambda: saver.save(next(steps), training.tree(), None)


def _span(training: Training, save: Callable[[], None], clock: Callable[[], float]) -> tuple[float, float]:
    began = clock()
    save()
    saved = clock()
    for _ in range(STEPS):
        training.step()
    return saved - began, (clock() - saved) / STEPS


def _torch_save(tree: dict[str, Any], path: Path) -> None:
    """As trainers do, and on the disk when it returns."""
    import torch

    aside = path.with_suffix(".aside")
    with aside.open("wb") as file:
        torch.save(tree, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _loads(training: Training, folder: Path, clock: Callable[[], float]) -> dict[str, float]:
    import torch
    from luthier.checkpoint import folder as checkpoint
    from luthier.state_tree import restore_optimizer

    def ours() -> None:
        restore_optimizer(
            training.optimizer,
            checkpoint.load_checkpoint(checkpoint.list_checkpoints(folder / "at_once")[-1])["optimizer"],
        )

    def torch_load() -> None:
        held = torch.load(folder / "torch.pt", weights_only=True)["optimizer"]
        restore_optimizer(training.optimizer, held)

    times: dict[str, list[float]] = {"ours": [], "torch_load": []}
    for _ in range(5):
        for name, act in (("ours", ours), ("torch_load", torch_load)):
            began = clock()
            act()
            times[name].append(clock() - began)
    return {name: min(found) for name, found in times.items()}
