"""The session of a trainer: the run as another library's loop has it, and what it tells of each step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
from torch import nn

from luthier.checkpoint.saver import Cadence, Saver
from luthier.data.prompt_rows import PromptRow
from luthier.plugins.contracts.protocols import Adapter, Optimizer, Quantizer
from luthier.plugins.contracts.values import Progress
from luthier.recipe import Recipe
from luthier.runs.writing.active_run import ActiveRun
from luthier.state_tree import optimizer_state
from luthier.training.trainers.frozen_policy import freeze_policy


@attrs.frozen(kw_only=True, eq=False)
class SteppedParts:
    """The built parts that a session tells of its steps, and the events' hooks."""

    adapter: Adapter
    quantizer: Quantizer
    optimizer: Optimizer
    hooks: Any
    saver: Saver
    switchable: bool = False  # whether the adapter says that it can be switched off


@attrs.define(kw_only=True, eq=False)
class TrainerSession:
    """One run in the hands of a trainer.

    `model` has its quantizer and adapter, and is called as any model of transformers; what trains requires gradients.
    `optimizer` is the recipe's, its groups at the recipe's learning rate. `rows` and `validation` hold a `PromptRow`
    each. `recipe` has the settings, `tokenizer` the chat template of the run, and `run` what a `RunView` has.

    A trainer calls `begin` once, before its first step. Each step is `step_started`, the backward passes,
    `gradients_ready`, clipping, `optimizer.step()`, `optimizer.zero_grad()`, `step_ended`; at least one has to be
    taken. After `step_ended` it ends where `run.stop_reason` is not None, and evaluates where `wants_evaluation` is
    True. `logged`, `evaluated` and `epoch_ended` are called as they come; numbers that are not told reach no callback.
    `reference` is called before the first step, and what computes evaluation numbers stands within `evaluating`.
    """

    recipe: Recipe
    model: Any
    tokenizer: Any
    rows: list[PromptRow]
    validation: list[PromptRow]
    optimizer: torch.optim.Optimizer
    run: ActiveRun
    losses: list[float] = attrs.field(factory=list)  # of each step
    evaluation: dict[str, float] = attrs.field(factory=dict)  # the newest
    tokens: int = 0  # that were generated and read, as the trainer counts them
    samples: int = 0
    parts: SteppedParts = attrs.field(repr=False)  # of the core; a trainer leaves them alone

    def begin(self, total_steps: int) -> None:
        """Say how many steps the run will have, before the first."""
        self.run.total_steps = total_steps
        self.parts.hooks.run_started(run=self.run)
        self.parts.hooks.task_started(run=self.run, task=0)

    def step_started(self, step: int) -> None:
        """Begin step `step`, the first of which is 1."""
        self.run.step = step
        self.parts.hooks.step_started(run=self.run, step=step)

    @property
    def wants_evaluation(self) -> bool:
        """True where an evaluation is asked for after this step."""
        return self.run.control.wants_evaluation

    def gradients_ready(self) -> None:
        """Say that the gradients of the step are summed, and not yet clipped: the adapter may add to them."""
        penalty = self.parts.adapter.penalty()
        if penalty is not None:
            penalty.backward()
        self.parts.adapter.gradients_ready()

    def step_ended(self, loss: float, epoch: float, *, samples: int, tokens: int = 0) -> None:
        """Take note that the optimizer has stepped; a checkpoint is written where one is due.

        `epoch` is how many have been done, fractional; `samples` and `tokens` are what this step has added.
        """
        run, parts = self.run, self.parts
        self.losses.append(loss)
        self.samples, self.tokens = self.samples + samples, self.tokens + tokens
        progress = Progress(step=run.step, total_steps=run.total_steps, epoch=epoch)
        parts.adapter.stepped(progress)
        parts.quantizer.progressed(progress)
        parts.hooks.step_ended(run=run, step=run.step, metrics={"loss": loss, "epoch": epoch})
        if run.signal is not None:
            run.request_stop(f"signal {run.signal}")
        last = run.step == run.total_steps or run.stop_reason is not None
        due = Cadence.of(self.recipe).due(
            step=run.step, samples=self.samples, seen=samples, epoch_ended=False, last=last
        )
        if run.control.wants_save or due:
            self._save(epoch)

    def logged(self, metrics: Mapping[str, float]) -> None:
        """Hand on the numbers since the last logging, which metrics.jsonl takes under the names that they have."""
        self.parts.hooks.logged(run=self.run, step=self.run.step, metrics=dict(metrics))

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Hand on the numbers over the validation rows; names begin with `eval_`."""
        self.run.control.wants_evaluation = False
        self.evaluation = dict(metrics)
        self.parts.hooks.evaluated(run=self.run, step=self.run.step, metrics=self.evaluation)

    def epoch_ended(self, epoch: int) -> None:
        """Say that epoch `epoch`, the first of which is 0, has been read to its end."""
        self.parts.hooks.epoch_ended(run=self.run, epoch=epoch)

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context within which the model has the weights that count, for optimizers that step others."""
        return self.parts.optimizer.evaluating()

    def reference(self) -> nn.Module:
        """Return the frozen model that the recipe's `reference` names, before the first step.

        `auto` is the base without a fresh adapter, or the policy as it begins where `adapter_from` gives its weights.
        """
        fresh, named = self.recipe.adapter_from is None, str(self.recipe.reference)
        return freeze_policy(self.model, self.parts.adapter, named, switchable=self.parts.switchable, fresh=fresh)

    def _save(self, epoch: float) -> None:
        """Write a checkpoint that `generate` and `merge` open as one of Luthier's own loop."""
        run, parts = self.run, self.parts
        run.control.begin_save()
        tally = {"step": run.step, "epoch": epoch, "tokens": self.tokens, "samples": self.samples, "best_step": None}
        tree = {
            "adapter": parts.adapter.state(),
            "optimizer": optimizer_state(self.optimizer),
            "parts": {"quantizer": parts.quantizer.state()},
            "callbacks": {},
            "tally": tally,
        }
        step = run.step
        parts.saver.save(step, tree, None, lambda path: parts.hooks.saved(run=run, step=step, path=path))
