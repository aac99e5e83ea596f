"""Tools for a part's long preparation: decisions, cached tensors, progress, and a look at activations.

`step.context` puts these functions into the `Context` that parts get.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from filelock import lock_descriptor
from torch import Tensor

from luthier.disk import cache_folder
from luthier.logs import get_logger
from luthier.model.policy import ModelPolicy
from luthier.plugins.contracts.values import Purpose
from luthier.randomness import keep_randomness
from luthier.runs.writing.decisions import Decisions

log = get_logger()
Value = TypeVar("Value")
FOLDER: Final = "tensors"
PATIENCE: Final = 1.0  # seconds before progress is shown
EVERY: Final = 30.0  # seconds between log lines where there is no terminal
PREFIX: Final = "part:"  # put before the names of parts' decisions, so that none is mistaken for the engine's
LOSS: Final = "loss:"  # the same for those of the loss, which neither an artifact nor a later task needs


def decide_with(decisions: Decisions, purpose: Purpose, prefix: str = PREFIX) -> Callable[..., Any]:
    """Return `decide(name, function, bound=None)` of a context: rank 0's JSON value, kept for a resume.

    In a plan it returns `bound`, as no number can be looked at.
    """

    def decide(name: str, function: Callable[[], Value], bound: Value | None = None) -> Value | None:
        if purpose == "plan":
            decisions.bounded.extend([] if bound is None else [name])
            return bound
        return decisions.take(f"{prefix}{name}", lambda: (function(), "decided by a part"))

    return decide


def keep_decisions(decisions: Decisions) -> dict[str, Any]:
    """Return what adapter and quantizer have decided, which an artifact's note and later tasks keep."""
    return {name: value for name, value in decisions.to_dict().items() if name.startswith(PREFIX)}


def cache_tensors(key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of `compute()`, kept on disk under a hash of `key`.

    One process computes; others on this machine that ask for the same key wait for it. A file that cannot be read is
    computed again.
    """
    from safetensors.torch import save_file

    folder = cache_folder() / FOLDER
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    tensors = _read_tensors(path)
    if tensors is not None:
        return tensors
    folder.mkdir(parents=True, exist_ok=True)
    with _held_alone(path.with_suffix(".lock")):
        tensors = _read_tensors(path)
        if tensors is None:
            tensors = {name: tensor.detach() for name, tensor in compute().items()}
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside)
            os.replace(aside, path)
    return tensors


def _read_tensors(path: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.is_file() else None
    except (OSError, SafetensorError) as error:
        log.warning("a cached file cannot be read, and is made again", file=str(path), error=str(error))
        return None


@contextlib.contextmanager
def _held_alone(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        lock_descriptor(file.fileno())
        yield


def run_body(model: Any, batch: Any) -> Tensor:
    """Return [T, H]: what the head reads of a packed batch, without gradient or dropout; hooks on layers see it."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), keep_randomness():
            return ModelPolicy(model).states(batch.to(model.device))
    finally:
        model.train(training)


def differentiate_body(model: Any, batch: Any) -> None:
    """Backpropagate minus the log-likelihood of a packed batch's labels; hooks on layers see it, no parameter does."""
    training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    handle = model.get_input_embeddings().register_forward_hook(lambda layer, inputs, output: output.requires_grad_())
    try:
        model.requires_grad_(False)
        with torch.enable_grad(), keep_randomness():
            placed = batch.to(model.device)
            total = ModelPolicy(model).token_logprobs(placed) * placed.token_weights
            (-total.sum()).backward()
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_()
        model.train(training)


def show_progress(total: int, text: str) -> Callable[..., None]:
    """Return `advance(n=1)`, which moves a bar on a terminal, or else writes a log line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, began = Console(stderr=True), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
    task, done, last = bar.add_task(text, total=total), 0, began

    def advance(n: int = 1) -> None:
        nonlocal done, last
        done, now = done + n, time.monotonic()
        if console.is_terminal and (now - began > PATIENCE or bar.live.is_started):
            bar.start()
            bar.update(task, completed=done, refresh=True)
            if done >= total:
                bar.stop()
        elif not console.is_terminal and now - last >= EVERY:
            last = now
            log.info(text, done=done, of=total)

    return advance
