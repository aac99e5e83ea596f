"""The state of TRL's loop between two steps, as tensors and JSON values: place, answers, numbers not yet logged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers

STATE_FILE: Final = "trainer_state.json"  # by which transformers' loop knows where it stands
OMITTED: Final = frozenset(("log_history", "stateful_callbacks"))
NEARLY: Final = 1e-6  # an epoch that has been read to its end may be a float below it


def keep_state(trainer: Any, *, logs: bool) -> dict[str, Any]:
    """Return the state after a step; `logs` says that the numbers since the last logging are about to be logged."""
    fields = {name: value for name, value in vars(trainer.state).items() if name not in OMITTED}
    return {
        "state": fields,
        "scheduler": trainer.lr_scheduler.state_dict(),
        "step": getattr(trainer, "_step", 0),
        "answers": getattr(trainer, "_buffered_inputs", None),
        "window": None if logs else _window(trainer),
    }


def place_state(trainer: Any, saved: Mapping[str, Any], folder: Path) -> None:
    """Let a trainer that has not begun go on from a state; `folder` is given to its loop as a checkpoint's."""
    trainer.kept = saved
    if hasattr(trainer, "_step"):
        trainer._step = saved["step"]
        trainer._buffered_inputs = _on_device(saved["answers"], trainer.accelerator.device)
    transformers.TrainerState(**saved["state"]).save_to_json(str(folder / STATE_FILE))


def epochs_read(saved: Mapping[str, Any] | None) -> int:
    """Return how many epochs were read to their end."""
    return 0 if saved is None else int(float(saved["state"]["epoch"] or 0.0) + NEARLY)


def restore_scheduler(trainer: Any, saved: Mapping[str, Any]) -> None:
    """Put the schedule back, and the learning rates that it has come to."""
    scheduler = trainer.lr_scheduler
    scheduler.load_state_dict(dict(saved["scheduler"]))
    for group, rate in zip(trainer.optimizer.param_groups, saved["scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate


def restore_window(trainer: Any, saved: Mapping[str, Any]) -> None:
    """Put back the numbers that were not logged yet; the loop has begun."""
    window = saved["window"]
    if window is None:
        return
    trainer._tr_loss = torch.tensor(window["loss"], device=trainer.args.device)
    trainer._globalstep_last_logged = window["since"]
    metrics = _metrics(trainer)
    for name, values in window["metrics"].items():
        metrics[name] = list(values)


def _window(trainer: Any) -> dict[str, Any]:
    numbers = {name: [float(value) for value in values] for name, values in _metrics(trainer).items()}
    return {"loss": float(trainer._tr_loss), "since": trainer._globalstep_last_logged, "metrics": numbers}


def _metrics(trainer: Any) -> Any:
    """The numbers since the last logging, by name."""
    return trainer._metrics["train"] if hasattr(trainer, "_metrics") else trainer.stats


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _on_device(each, device) for name, each in value.items()}
    return [_on_device(each, device) for each in value] if isinstance(value, list) else value
