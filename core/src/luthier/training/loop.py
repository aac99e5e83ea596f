"""The loop: data, step, log, evaluate, save, top to bottom; where each event fires is drawn in `plugins.events`."""

from __future__ import annotations

import functools
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import attrs
import torch

from luthier.checkpoint import folder as checkpoint
from luthier.checkpoint import run_state as contents
from luthier.checkpoint.constants import restore_constants, store_constants
from luthier.checkpoint.saver import Cadence, Saver
from luthier.checkpoint.shards import as_held
from luthier.checkpoint.task_state import take_task_state
from luthier.data.batches.example_feed import Portion, Reached
from luthier.distributed.agreement import agree_requests, local_callbacks
from luthier.distributed.broadcast import broadcast_tree
from luthier.hardware.peak_memory import peak_memory
from luthier.health.monitor import Health
from luthier.health.trace import Traceable
from luthier.logs import get_logger
from luthier.model.weights.shard_tensors import is_sharded
from luthier.plugins.completion import has_default
from luthier.plugins.events import connect_callbacks
from luthier.recipe.objects import TaskPlace
from luthier.runs.writing import save_requests as requests
from luthier.runs.writing.active_run import ActiveRun, Interrupted
from luthier.runs.writing.run_control import Course
from luthier.step import out_of_memory as recovery
from luthier.step.evaluation.evaluate import Abandoned, evaluate_loss, evaluate_tuned
from luthier.step.over_batches import begin_loss
from luthier.step.reference.reference_check import begin_companions
from luthier.step.setup import Setup
from luthier.step.start_weights import begin_penalties
from luthier.step.update import Update, accumulate_gradients, update_weights
from luthier.training.best_metric import improves_metric
from luthier.training.tally import Tally

log = get_logger()


class Loop:
    """Trains a `Setup` to its last step, from wherever its newest checkpoint stands."""

    def __init__(self, setup: Setup, run: ActiveRun, callbacks: dict[str, Any], task: TaskPlace | None = None) -> None:
        self.setup, self.run, self.callbacks, self.control = setup, run, callbacks, run.control
        self.tally, self.task = Tally(batch=setup.recipe.global_batch_size), task or TaskPlace()
        self.recent: list[Update] = []
        self.portion: Portion | None = None  # of the last step
        self.constants: dict[str, str] = {}  # files of frozen tensors, by owner
        self.health = Health(setup.recipe, setup.adapter, setup.rates.peak, trace_target(setup))
        self.hooks = connect_callbacks(callbacks if run.is_main else local_callbacks(callbacks))
        self.spent = setup.phases.meter()
        self.cadence = Cadence.of(setup.recipe)
        background, limit = setup.recipe.async_save, setup.recipe.save_total_limit
        self.saver = Saver(run.folder, run.belongs, background=background, limit=limit, world=setup.world)

    def train(self) -> Tally:
        setup, run = self.setup, self.run
        with self.saver, closing(setup.phases.over("data", setup.portions(self.tally.step))) as portions:
            for portion in portions if self._set_out() else ():
                run.step, self.portion = portion.step + 1, portion
                run.total_steps = run.step if portion.last else run.total_steps
                self.hooks.step_started(run=run, step=run.step)
                self.health.look(run.step)
                done = update_weights(setup, portion.step, portion)
                self.health.see(run.step, done, portion.examples)
                self.recent.append(done)
                self.tally.count(done, portion.ended, recovery.lowered_limit(setup))
                if not done.finite:
                    self._hold(portion)
                self.hooks.step_ended(run=run, step=run.step, metrics=self._numbers(self.recent[-1:]))
                self._log()
                if portion.ends_epoch:
                    self.hooks.epoch_ended(run=run, epoch=round(portion.ended) - 1)
                self._agree()
                if self._evaluation_due():
                    self._evaluate()
                self._log_last()
                self.saver.collect()
                if self._save_due(portion, done):
                    self.save()
                if self.control.course is not Course.ON:
                    break
        self._finish()
        return self.tally

    def _set_out(self) -> bool:
        """Do what comes before the next step, and return whether there is to be one."""
        control = self.control
        owed, control.owes_evaluation = control.owes_evaluation, False
        if self.tally.step == 0:
            self._begin()
        elif owed and self.setup.validation is not None:
            self._evaluate()
            self._log_last()
            if not control.owes_evaluation:
                self.save()  # replaces the checkpoint that still owes this evaluation
        return control.stop_reason is None and not control.owes_evaluation

    def _begin(self) -> None:
        if self.task.carried is not None:
            take_task_state(self.setup.adapter, self.task.carried, self.setup.world, self.hold)
        self.setup.adapter.begin_task(self.task.index, self.task.total)
        begin_companions(self.setup)
        begin_penalties(self.setup)
        self._keep_constants()
        begin_loss(self.setup)
        self.health.begin()
        self.hooks.task_started(run=self.run, task=self.task.index)
        if self.setup.recipe.eval_on_start:
            self._evaluate()

    def _keep_constants(self) -> None:
        """Write the frozen tensors of parts, which every checkpoint from here on names and none holds."""
        self.constants = store_constants(self.run.folder, self.setup.constant_owners, self.setup.world)
        self.saver.constants = tuple(self.constants.values())

    def _agree(self) -> None:
        """Let what was asked until now count for this step, on every rank."""
        if self.run.is_main and requests.take_request(self.run.folder):
            self.run.request_save()
        agree_requests(self.control, self.setup.world)

    def save(self) -> None:
        """Begin a checkpoint of this step; `saved` fires once it is complete."""
        run, step = self.run, self.run.step
        self.control.begin_save()
        asked = run.is_main and requests.request_taken(run.folder)
        with self.setup.phases("saving"):
            state = self._state()
            if run.is_main or is_sharded(state):
                best = self.tally.best_step
                place = None if best is None else checkpoint.folder_of(run.folder, best)  # perhaps not complete yet
                self.saver.save(step, state, place, then=lambda path: self.hooks.saved(run=run, step=step, path=path),
                                after=lambda: requests.answer_request(run.folder) if asked else None)  # fmt: skip

    def resume(self, tree: dict[str, Any], source: Path, fresh: frozenset[str] = frozenset()) -> None:
        """Put everything back as the checkpoint has it, but what is named in `fresh`; `source` is its run's folder."""
        setup = self.setup
        self.constants = tree.get("constants", {})
        self.saver.constants = tuple(self.constants.values())
        restore_constants(self.run.folder, self.constants, setup.constant_owners, setup.world, source)
        begin_penalties(setup, self.constants)
        contents.restore_state(setup.adapter, setup.optimizer, setup.stateful_parts, self.callbacks, tree, fresh)
        self.health.load_state(tree.get("health", {}))
        self.recent = [Update(**numbers) for numbers in tree.get("recent", [])]
        tally, control = dict(tree["tally"]), self.control
        control.owes_evaluation = tally.pop("owes_evaluation", False)
        control.stop_reason = tally.pop("stop_reason", None)
        tally["losses"] = tally["losses"].tolist()
        self.tally = Tally(**tally)
        recovery.hold_limit(setup, self.tally.token_limit)
        self._go_on({} if "feed" in fresh else tree.get("feed", {}))
        if "feed" in fresh:
            self.tally.check_rows_left(self.run.total_steps)
        setup.tell_progress(setup.progress_after(self.tally.step, self.tally.epoch))
        if "loss" in fresh:  # the checkpoint had another loss
            begin_loss(setup)
        self.hooks.resumed(run=self.run, step=self.tally.step)

    def _go_on(self, position: dict[str, Any]) -> None:
        """Stand where the tally does, in the rows and in the schedule; how many steps are left follows from it."""
        tally, run = self.tally, self.run
        reached = Reached(step=tally.step, samples=tally.samples, batch=tally.batch)
        self.setup.feed.load_state(position, reached)
        self.setup.resume_at(reached, tally.held)
        run.step, run.total_steps = tally.step, self.setup.feed.total

    def hold(self, tree: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Return the tree of the checkpoint in `folder` as this world holds it."""
        setup = self.setup
        return as_held(tree, folder, setup.adapter, setup.optimizer, sharded=setup.is_sharded)

    def best_checkpoint(self) -> Path | None:
        """Return the folder of the best evaluated checkpoint, if it was kept."""
        if self.tally.best_step is None:
            return None
        path = checkpoint.folder_of(self.run.folder, self.tally.best_step)
        return path if path.is_dir() else None

    def _end_task(self) -> None:
        """Take the best weights where they were asked for, let the adapter finish its task, and evaluate the result."""
        adapter = self.setup.adapter
        changed = self.setup.recipe.load_best_model_at_end and self._load_best()
        if not has_default(adapter, "adapter", "end_task"):
            adapter.end_task(self.task.index, self.task.total)
            changed = True
        if self.setup.validation is not None:
            adapter.review_task(lambda: evaluate_loss(self.setup)["eval_loss"])
        if changed and self.setup.validation is not None:
            self.tally.evaluation = evaluate_loss(self.setup)

    def _load_best(self) -> bool:
        """Go back to the best checkpoint's weights; False where these are the last ones."""
        world = self.setup.world
        best = world.decide(lambda: None if (path := self.best_checkpoint()) is None else str(path))
        if best is None:
            log.warning("no best checkpoint to end with: these are the last weights", best_step=self.tally.best_step)
        if best is None or self.tally.best_step == self.run.step:
            return False
        tree = broadcast_tree(world, lambda: checkpoint.load_checkpoint(Path(best)))
        setup, tree = self.setup, self.hold(tree, Path(best))
        contents.restore_weights(setup.adapter, setup.optimizer, setup.stateful_parts, tree)
        return True

    def _state(self) -> dict[str, Any]:
        setup, tally, control = self.setup, attrs.asdict(self.tally), self.control
        ending = {"owes_evaluation": control.owes_evaluation, "stop_reason": control.stop_reason}
        return {
            **contents.collect_state(setup.adapter, setup.optimizer, setup.stateful_parts, self.callbacks),
            "feed": self.setup.feed.state(self.portion),
            "health": self.health.state(),
            "constants": dict(self.constants),
            "recent": [update.numbers() for update in self.recent],
            "tally": {**tally, **ending, "losses": torch.tensor(tally["losses"], dtype=torch.float64)},
        }

    def _hold(self, portion: Portion) -> None:
        """Let the schedule wait for a step that moved no weight."""
        pace, tally = self.setup.pace, self.tally
        place = pace.place(portion.step, portion.samples)
        pace.held = tally.held = pace.held + pace.place(tally.step, tally.samples) - place
        log.info("the learning rate's schedule waits, as the step was skipped", step=tally.step, schedule_step=place)

    def _log(self) -> None:
        """Log the numbers since the last logging, where that is due; the last step is always logged."""
        step, last = self.run.step, self.run.step == self.run.total_steps
        if step % self.setup.recipe.logging_steps == 0 or last or self.control.is_ending:
            self.hooks.logged(run=self.run, step=step, metrics={**self._numbers(self.recent), **self.spent.numbers()})
            self.recent, self.health.flow = [], {}

    def _log_last(self) -> None:
        """Log the step that what was agreed on has made the last one, where it is not logged yet."""
        if self.control.stop_reason is not None and self.recent:
            self._log()

    def _numbers(self, updates: list[Update]) -> dict[str, float]:
        numbers = self.tally.numbers(updates, peak_memory(self.setup.device))
        return {**numbers, **self.setup.numbers_of(self.portion), **self.health.flow}

    def _evaluation_due(self) -> bool:
        if self.setup.validation is None:
            return False
        every, last = self.setup.recipe.eval_steps, self.run.step == self.run.total_steps
        return self.control.wants_evaluation or last or bool(every and self.run.step % every == 0)

    def _evaluate(self) -> None:
        """Evaluate, and let what that asks for count. A signal may cut it off: it is then owed, and done on resume."""
        control = self.control
        control.begin_evaluation()
        with self.setup.phases("evaluation"), suppress(Abandoned):
            metrics = evaluate_tuned(self.setup, leave=lambda: control.signal is not None)
            control.complete_evaluation()
        if not control.owes_evaluation:
            self.tally.evaluation = metrics
            self._judge(metrics)
            self.hooks.evaluated(run=self.run, step=self.run.step, metrics=metrics)
        self._agree()

    def _judge(self, metrics: dict[str, float]) -> None:
        """Remember the best; its checkpoint is written where the run must end with it."""
        recipe = self.setup.recipe
        if improves_metric(recipe, metrics, self.tally.best_metric) and self.run.step:  # after a step, not before
            self.tally.best_metric, self.tally.best_step = metrics[recipe.metric_for_best_model], self.run.step
            self.control.wants_save |= recipe.load_best_model_at_end

    def _save_due(self, portion: Portion, done: Update) -> bool:
        course = self.control.course
        if course is Course.INTERRUPTED or self.control.wants_save:
            return True
        return self.cadence.due(step=self.run.step, samples=self.tally.samples, seen=done.documents,
                                epoch_ended=portion.ends_epoch,
                                last=portion.last or course is Course.STOPPED)  # fmt: skip

    def _finish(self) -> None:
        run, signal = self.run, self.control.agreed_signal
        unfinished = self.control.owes_evaluation or run.step != run.total_steps
        if signal is not None and unfinished:  # the task continues when the run is resumed
            self.hooks.stopped(run=run, step=run.step, reason=f"signal {signal}")
            raise Interrupted(signal, run.step, run.folder)
        self.health.end(run.step)
        self._end_task()
        self.hooks.task_ended(run=run, task=self.task.index)
        if run.stop_reason is not None and run.step != run.total_steps:
            self.hooks.stopped(run=run, step=run.step, reason=run.stop_reason)


def trace_target(setup: Setup) -> Traceable:
    """Return what a trace of one of its steps looks at."""
    return Traceable(model=setup.model, step=setup.step, optimizer=setup.optimizer, world=setup.world,
                     accumulate=functools.partial(accumulate_gradients, setup))  # fmt: skip
