"""The loop: data, step, log, evaluate, save, top to bottom; where each event fires is drawn in `plugins.events`."""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path
from typing import Any, Final

import attrs
import pluggy
import torch

from luthier.engine import checkpoint
from luthier.engine.evaluate import divided, evaluate
from luthier.engine.run import ActiveRun, Interrupted
from luthier.engine.setup import Setup
from luthier.engine.state import optimizer_state, restore_optimizer
from luthier.engine.update import Update, update
from luthier.errors import LuthierError, nearest
from luthier.logs import get_logger
from luthier.plugins.events import Events

log = get_logger()
WATCHED: Final = 5  # steps: after a warm-up's first rate of 0, the second matrix of LoRA moves from the third on


@attrs.define(kw_only=True)
class Tally:
    """What a run has done so far; part of every checkpoint."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_metric: float | None = None
    evaluation: dict[str, float] = attrs.field(factory=dict)
    losses: list[float] = attrs.field(factory=list)
    stop_reason: str | None = None  # so that a run killed after its early stop does not train on


class Loop:
    """Trains a `Setup` to its last step, from wherever its newest checkpoint stands."""

    def __init__(self, setup: Setup, run: ActiveRun, callbacks: dict[str, Any]) -> None:
        self.setup, self.run, self.callbacks = setup, run, callbacks
        self.tally = Tally()
        self.recent: list[Update] = []
        self.reached: set[str] = set()
        self.hooks = _events(callbacks)

    def train(self) -> Tally:
        setup, run = self.setup, self.run
        if self.tally.step == 0:
            setup.adapter.begin_task(0)
            self.hooks.task_started(run=run, task=0)
        if self.tally.step == 0 and setup.recipe.eval_on_start:
            self._evaluate()
        last = self.tally.step if run.stop_reason else run.total_steps
        for index, rows in setup.order.steps(last, first=self.tally.step):
            run.step = index + 1
            self.hooks.step_started(run=run, step=run.step)
            self._count(update(setup, index, rows))
            self._watch_gradients()
            self.hooks.step_ended(run=run, step=run.step, metrics=self._numbers(self.recent[-1:]))
            self._log()
            self._end_epoch()
            if self._evaluation_due():
                self._evaluate()
            if run.stop_reason and self.recent:  # an evaluation has made this the last step
                self._log()
            if self._save_due():
                self.save()
            if run.stop_reason or run.signal:
                break
        self._finish()
        return self.tally

    def save(self) -> Path:
        """A checkpoint of this step, and fewer old ones."""
        self.run.wants_save, self.tally.stop_reason = False, self.run.stop_reason
        path = checkpoint.save(self.run.folder, self.run.step, self._state(), self.run.belongs)
        checkpoint.prune(self.run.folder, self.setup.recipe.save_total_limit, self.best_checkpoint())
        self.hooks.saved(run=self.run, step=self.run.step, path=path)
        return path

    def resume(self, tree: dict[str, Any]) -> None:
        """Put everything back as the checkpoint has it."""
        setup = self.setup
        setup.adapter.load_state(tree["adapter"])
        restore_optimizer(setup.optimizer, tree["optimizer"])
        for name, part in (("loss", setup.loss), ("quantizer", setup.quantizer), *self.callbacks.items()):
            if name in tree["parts"]:
                part.load_state(tree["parts"][name])
        held = dict(tree["tally"])
        self.tally = Tally(**{**held, "losses": held["losses"].tolist()})
        self.run.step, self.run.stop_reason = self.tally.step, self.tally.stop_reason
        self.hooks.resumed(run=self.run, step=self.tally.step)

    def best_checkpoint(self) -> Path | None:
        """The folder of the best evaluated checkpoint, if it was kept."""
        if self.tally.best_step is None:
            return None
        path = self.run.folder / checkpoint.FOLDER / f"step-{self.tally.best_step:08d}"
        return path if path.is_dir() else None

    def load_best(self) -> None:
        """Go back to the best checkpoint's weights, and evaluate them again: the numbers are its own."""
        best = self.best_checkpoint()
        if best is None or self.tally.best_step == self.run.step:
            return
        self.setup.adapter.load_state(checkpoint.load(best)["adapter"])
        self.tally.evaluation = evaluate(self.setup)

    def _state(self) -> dict[str, Any]:
        parts = {"loss": self.setup.loss, "quantizer": self.setup.quantizer, **self.callbacks}
        tally = attrs.asdict(self.tally)
        return {
            "adapter": self.setup.adapter.state(),
            "optimizer": optimizer_state(self.setup.optimizer),
            "parts": {name: part.state() for name, part in parts.items() if hasattr(part, "state")},
            "tally": {**tally, "losses": torch.tensor(tally["losses"], dtype=torch.float64)},
        }

    def _count(self, done: Update) -> None:
        tally = self.tally
        tally.step = self.run.step
        tally.tokens += done.tokens
        tally.supervised_tokens += done.supervised_tokens
        tally.samples += done.documents
        tally.seconds += done.seconds
        tally.losses.append(done.loss)
        self.recent.append(done)

    def _watch_gradients(self) -> None:
        """Say once which trained parameters no gradient has reached in the first steps: they stay as they are."""
        step = self.run.step
        if step > WATCHED:
            return
        groups = self.setup.adapter.groups()
        named = [pair for group in groups for pair in zip(group.names, group.parameters, strict=True)]
        self.reached |= {name for name, p in named if p.grad is not None and bool(p.grad.any())}
        idle = [name for name, _ in named if name not in self.reached]
        if step == WATCHED and idle:
            log.warning("no gradient reached", parameters=len(idle), first=idle[:3], steps=step)

    def _log(self) -> None:
        """The numbers since the last logging; the last step is always logged."""
        step, last = self.run.step, self.run.step == self.run.total_steps
        if step % self.setup.recipe.logging_steps == 0 or last or self.run.stop_reason or self.run.signal:
            self.hooks.logged(run=self.run, step=step, metrics=self._numbers(self.recent))
            self.recent = []

    def _numbers(self, updates: list[Update]) -> dict[str, float]:
        seconds = sum(u.seconds for u in updates)
        weight = max(sum(u.supervised_tokens for u in updates), 1)
        numbers = {
            "loss": sum(u.loss * u.supervised_tokens for u in updates) / weight,
            "grad_norm": updates[-1].grad_norm,
            "learning_rate": updates[-1].learning_rate,
            "epoch": self.run.step / self.setup.order.steps_per_epoch,
            "tokens": sum(u.tokens for u in updates),
            "supervised_tokens": sum(u.supervised_tokens for u in updates),
            "total_tokens": self.tally.tokens,
            "samples": self.tally.samples,
            "tokens_per_second": sum(u.tokens for u in updates) / max(seconds, 1e-9),
            "peak_memory": peak_memory(self.setup.device),
            "elapsed": self.tally.seconds,
        }
        if len(updates) == 1:
            numbers["loss"] = updates[0].loss
        return {**numbers, **divided([u.metrics for u in updates]), **self.setup.numbers}

    def _end_epoch(self) -> None:
        epoch, place = divmod(self.run.step, self.setup.order.steps_per_epoch)
        if place == 0:
            self.hooks.epoch_ended(run=self.run, epoch=epoch - 1)

    def _evaluation_due(self) -> bool:
        if self.setup.validation is None:
            return False
        every, last = self.setup.recipe.eval_steps, self.run.step == self.run.total_steps
        return self.run.wants_evaluation or last or bool(every and self.run.step % every == 0)

    def _evaluate(self) -> None:
        self.run.wants_evaluation = False
        found = evaluate(self.setup)
        self.tally.evaluation = found
        self._judge(found)
        self.hooks.evaluated(run=self.run, step=self.run.step, metrics=found)

    def _judge(self, found: dict[str, float]) -> None:
        """Remember the best; its checkpoint is written where the run must end with it."""
        recipe = self.setup.recipe
        name = recipe.metric_for_best_model
        if name not in found:
            problem, remedy = f"an evaluation gives no {name!r}", nearest(name, found)
            raise LuthierError("recipe-conflict", problem, where="metric_for_best_model", remedy=remedy)
        more = recipe.greater_is_better
        more = "loss" not in name and "perplexity" not in name if more is None else more
        best = self.tally.best_metric
        if math.isnan(found[name]) or self.run.step == 0:  # before the first step there is no checkpoint to be best
            return
        if best is None or (found[name] > best if more else found[name] < best):
            self.tally.best_metric, self.tally.best_step = found[name], self.run.step
            self.run.wants_save |= recipe.load_best_model_at_end

    def _save_due(self) -> bool:
        every, last = self.setup.recipe.save_steps, self.run.step == self.run.total_steps
        ended = self.run.stop_reason is not None or self.run.signal is not None
        return self.run.wants_save or last or ended or bool(every and self.run.step % every == 0)

    def _finish(self) -> None:
        run = self.run
        if run.signal is not None and run.step < run.total_steps:  # the task goes on when the run is resumed
            self.hooks.stopped(run=run, step=run.step, reason=f"signal {run.signal}")
            raise Interrupted(run.signal, run.step, run.folder)
        self.setup.adapter.end_task(0)
        self.hooks.task_ended(run=run, task=0)
        if run.stop_reason and run.step < run.total_steps:
            self.hooks.stopped(run=run, step=run.step, reason=run.stop_reason)


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or resident on a CPU, at the most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _events(callbacks: dict[str, Any]) -> Any:
    """One pluggy manager for this run."""
    manager = pluggy.PluginManager("luthier-events")
    manager.add_hookspecs(Events)
    for name, callback in callbacks.items():
        manager.register(callback, name)
        manager.check_pending()
    return manager.hook
