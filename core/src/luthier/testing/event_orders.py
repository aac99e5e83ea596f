"""A run as its callbacks see it, without the training: every order of events that the loop can produce."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pluggy

from luthier.plugins.events import EVENTS, Events
from luthier.plugins.registry import check_part

TOTAL: Final = 4  # steps of a run
EPOCH: Final = 2  # steps of an epoch
PHASES: Final = {f"seconds/{phase}": 0.02 for phase in ("data", "forward", "backward", "optimizer")}
ERROR: Final = RuntimeError("a failure that the kit made up")


def connect_parts(parts: list[Any]) -> Any:
    """Return the hooks of one run with these callbacks. Raises if an event or an argument is unknown."""
    manager = pluggy.PluginManager("luthier-events")
    manager.add_hookspecs(Events)
    for part in parts:
        check_part(part, "callback", type(part).__name__)
        manager.register(part)
        manager.check_pending()
    return manager.hook


def heard_events(part: Any) -> list[str]:
    """Return the events that a callback implements. Raises `AssertionError` for one that would never be called."""
    named = [name for name in EVENTS if callable(getattr(part, name, None))]
    unmarked = [name for name in named if not hasattr(getattr(part, name), "luthier-events_impl")]
    assert not unmarked, f"{', '.join(unmarked)} of {type(part).__name__} is not marked with @luthier.event"
    assert named, f"{type(part).__name__} listens to no event: {', '.join(EVENTS)}"
    return named


class Stage:
    """The events of one process of a run, sent in the loop's order to real hooks; `seen` lists their names."""

    def __init__(self, part: Any, folder: Path, step: int = 0) -> None:
        from luthier.runs.writing.active_run import ActiveRun

        self.part, self.hooks = part, connect_parts([part])
        self.seen: list[str] = []
        self.run = ActiveRun(
            run_id="20260102-030405-abcd",
            folder=folder,
            name="conformance",
            settings=_settings(folder),
            total_steps=TOTAL,
            step=step,
        )

    def fire(self, name: str, **arguments: Any) -> None:
        self.seen.append(name)
        try:
            getattr(self.hooks, name)(run=self.run, **arguments)
        except Exception as error:
            error.add_note(f"Events of this process: {', '.join(self.seen)}")
            raise

    def begin(self, *, evaluate: bool = False) -> None:
        self.fire("run_started")
        self.fire("task_started", task=0)
        if evaluate:
            self.evaluated()

    def go_on(self) -> None:
        self.fire("resumed", step=self.run.step)

    def train_step(self, *, log: bool = True, evaluate: bool = False, save: bool = False) -> bool:
        """Send the events of one step, and return True if a checkpoint was due.

        After the last step, or one at which a stop was asked for, the events are those that the loop then sends.
        """
        run = self.run
        run.step += 1
        self.fire("step_started", step=run.step)
        self.fire("step_ended", step=run.step, metrics=self.numbers())
        last = run.step == TOTAL
        if log or last or run.stop_reason:
            self.fire("logged", step=run.step, metrics=self.numbers() | PHASES)
        if run.step % EPOCH == 0:
            self.fire("epoch_ended", epoch=run.step // EPOCH - 1)
        if evaluate or last or run.control.wants_evaluation:
            run.control.wants_evaluation = False
            self.evaluated()
        return save or last or run.control.wants_save or run.stop_reason is not None

    def evaluated(self) -> None:
        loss = 3.0 / (self.run.step + 1)
        metrics = {"eval_loss": loss, "eval_accuracy": 0.5, "eval_perplexity": 2.0 + loss}
        self.fire("evaluated", step=self.run.step, metrics=metrics)

    def saved(self, step: int | None = None) -> None:
        """Send `saved` for the checkpoint after `step`: this step, or an earlier one whose writing took longer."""
        self.run.control.begin_save()
        step = self.run.step if step is None else step
        path = self.run.folder / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True, exist_ok=True)
        self.fire("saved", step=step, path=path)

    def end_task(self) -> None:
        self.fire("task_ended", task=0)
        if self.run.stop_reason and self.run.step < TOTAL:
            self.fire("stopped", step=self.run.step, reason=self.run.stop_reason)

    def interrupt(self) -> None:
        """End the process by a signal: the checkpoint is written, in the middle of the task."""
        self.fire("stopped", step=self.run.step, reason="signal 15")

    def complete(self) -> None:
        self.fire("completed", result=self.result())

    def fail(self) -> None:
        self.fire("failed", error=ERROR)

    def numbers(self) -> dict[str, float]:
        """Return the metrics that the loop gives for a step."""
        step = self.run.step
        return {
            "loss": 3.0 / step,
            "grad_norm": 1.0,
            "learning_rate": 1e-4,
            "epoch": step / EPOCH,
            "steps_per_epoch": EPOCH,
            "tokens": 64,
            "supervised_tokens": 32,
            "total_tokens": 64 * step,
            "samples": 4 * step,
            "num_samples": 4,
            "micro_batches": 1,
            "tokens_per_second": 640.0,
            "samples_per_second": 40.0,
            "seconds_per_step": 0.1,
            "seconds_per_micro_batch": 0.1,
            "peak_memory": 2**28,
            "elapsed": 0.1 * step,
            "skipped_steps": 0,
            "accuracy": 0.5,
        }

    def result(self) -> Any:
        from luthier.training.run import Run

        run = self.run
        return Run(
            run_id=run.run_id,
            steps=run.step,
            final_loss=1.0,
            loss_history=[1.0] * run.step,
            eval_loss=1.0,
            eval_metrics={"eval_loss": 1.0},
            duration_seconds=0.1 * run.step,
            samples_seen=4 * run.step,
            tokens_seen=64 * run.step,
            output_path=run.folder,
            artifact=run.folder / "adapter",
            merged=None,
            best_checkpoint=None,
            stop_reason=run.stop_reason,
            parts=[],
        )


def _settings(folder: Path) -> dict[str, Any]:
    from luthier.recipe import Recipe

    data = {"train": "train.jsonl", "validation": 0.1}  # rows for evaluations, because this run has some
    return Recipe.from_dict({"model": "demo", "data": data, "output_dir": str(folder)}).to_dict()


def play_run(part: Any, folder: Path, steps: int = TOTAL, kind: type[Stage] = Stage) -> Stage:
    """Play a run from its start, and to its end if `steps` are all of them."""
    stage = kind(part, folder)
    stage.begin(evaluate=True)
    while stage.run.step < steps and not stage.run.stop_reason:
        if stage.train_step(evaluate=stage.run.step == 1, save=stage.run.step == 1):
            stage.saved()
    if stage.run.step == TOTAL or stage.run.stop_reason:
        stage.end_task()
        stage.complete()
    return stage


def played_run(part: Any, steps: int = TOTAL) -> Stage:
    """Play a run in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return play_run(part, Path(folder), steps)


def copy_values(part: Any) -> dict[str, Any]:
    """Return copies of the part's plain values: its own attributes, and those of its class that can change."""
    plain = (bool, int, float, str, type(None), list, dict, set, tuple)
    names = [n for n in dir(part) if not n.startswith("__")]
    return {n: copy.deepcopy(v) for n in names if isinstance(v := getattr(part, n), plain) and _copies(v)}


def _copies(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # an open file or a lock, which cannot be compared
        return False
    return True


def differing_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
