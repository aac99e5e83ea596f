"""The session of a trainer: what the loop of another library gets from a run, and what it reports to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
from torch import nn

from luthier.checkpoint.run_state import collect_state
from luthier.checkpoint.saver import Cadence, Saver
from luthier.data.prompt_rows import PromptRow
from luthier.plugins.contracts.protocols import Adapter, Optimizer, Quantizer
from luthier.plugins.contracts.side_protocols import Penalty, Trainer
from luthier.plugins.contracts.values import Progress
from luthier.randomness import seed_all
from luthier.recipe import Recipe
from luthier.runs.writing.active_run import ActiveRun
from luthier.state_tree import copy_state
from luthier.step.losses.loss_output import PENALTY
from luthier.step.start_weights import sum_penalties
from luthier.training.trainers.frozen_policy import freeze_policy


@attrs.frozen(kw_only=True, eq=False)
class SteppedParts:
    """The built parts that a session tells of its steps, and the events' hooks."""

    adapter: Adapter
    quantizer: Quantizer
    optimizer: Optimizer
    trainer: Trainer
    hooks: Any
    callbacks: Mapping[str, Any]
    saver: Saver
    cadence: Cadence
    penalties: Sequence[Penalty] = ()
    switchable: bool = False  # True if the adapter can be switched off


@attrs.define(kw_only=True, eq=False)
class TrainerSession:
    """The objects that a trainer gets from a run, and the methods by which it reports its steps.

    - `recipe` is the resolved recipe, `run` has what a `RunView` has, and `tokenizer` has the chat template of the run.
    - `model` is a transformers model with its quantizer and adapter. The weights that train require gradients.
    - `optimizer` is the recipe's. Its groups have the recipe's learning rate.
    - `rows` and `validation` hold a `PromptRow` for each prompt.
    - `wants_evaluation` is True if an evaluation was requested after this step.

    A trainer calls `begin` once. Each step, of which there must be at least one, is `step_started`, the backward
    passes, `gradients_ready`, clipping, `optimizer.step()`, `optimizer.zero_grad()` and `step_ended`. After
    `step_ended` the trainer ends if `run.stop_reason` is not None, and evaluates, within `evaluating`, if
    `wants_evaluation` is True. It calls `logged`, `evaluated` and `epoch_ended` when there is something to report;
    callbacks hear nothing else. `reference` may be called before the first step only.

    In a resumed run, `resumed` is what the trainer's `state` returned after step `run.step`, and the next step is the
    one after it; model and optimizer are restored. At the start of each step the random states are set from the run's
    seed and the step, so that they are the same after a resume.
    """

    recipe: Recipe
    model: Any
    tokenizer: Any
    rows: list[PromptRow]
    validation: list[PromptRow]
    optimizer: torch.optim.Optimizer
    run: ActiveRun
    losses: list[float] = attrs.field(factory=list)  # of each step
    penalties: list[float] = attrs.field(factory=list)  # of each step since the last logging
    evaluation: dict[str, float] = attrs.field(factory=dict)  # the newest evaluation
    tokens: int = 0  # tokens generated and read, as the trainer counts them
    samples: int = 0
    resumed: Mapping[str, Any] | None = None
    ended: bool = False  # True if the checkpoint is that of the last step
    begun: Mapping[str, Any] | None = attrs.field(
        default=None, repr=False
    )  # a resumed run's adapter at its first start
    parts: SteppedParts = attrs.field(repr=False)  # for the core only; a trainer leaves them alone

    def begin(self, total_steps: int) -> None:
        """Report, before the first step, how many steps the run will have."""
        self.run.total_steps = total_steps
        if self.resumed is not None:
            self.parts.hooks.resumed(run=self.run, step=self.run.step)
            return
        self.parts.hooks.run_started(run=self.run)
        self.parts.hooks.task_started(run=self.run, task=0)

    def step_started(self, step: int) -> None:
        """Report that step `step` (from 1) begins. This sets the random states."""
        seed_all(self.recipe.seed, step)
        self.run.step = step
        self.parts.hooks.step_started(run=self.run, step=step)

    @property
    def wants_evaluation(self) -> bool:
        """Return True if an evaluation was requested after this step."""
        return self.run.control.wants_evaluation

    def gradients_ready(self) -> None:
        """Report that the gradients are summed and not yet clipped.

        The gradients of the adapter's penalty and of the recipe's are added, and the adapter may change the sums.
        """
        penalty = sum_penalties(self.parts.adapter, self.parts.penalties)
        if penalty is not None:
            penalty.backward()
            self.penalties.append(float(penalty.detach()))
        self.parts.adapter.gradients_ready()

    def step_ended(self, loss: float, epoch: float, *, samples: int, tokens: int = 0) -> None:
        """Report that the optimizer has stepped. A checkpoint is written if one is due.

        `epoch` is the number of epochs done (fractional). `samples` and `tokens` count what this step processed.
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
        due = parts.cadence.due(step=run.step, samples=self.samples, seen=samples, epoch_ended=False, last=last)
        if run.control.wants_save or due or run.signal is not None:
            self._save(epoch, ended=last and run.signal is None)

    def logged(self, metrics: Mapping[str, float]) -> None:
        """Report the metrics since the last logging. They are written to metrics.jsonl under these names.

        The mean of the penalties since then is added to them, as `penalty`.
        """
        mean = {PENALTY: sum(self.penalties) / len(self.penalties)} if self.penalties else {}
        self.penalties = []
        self.parts.hooks.logged(run=self.run, step=self.run.step, metrics={**metrics, **mean})

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Report the metrics of the validation rows. Their names begin with `eval_`."""
        self.run.control.wants_evaluation = False
        self.evaluation = dict(metrics)
        self.parts.hooks.evaluated(run=self.run, step=self.run.step, metrics=self.evaluation)

    def epoch_ended(self, epoch: int) -> None:
        """Report that epoch `epoch` (from 0) has ended."""
        self.parts.hooks.epoch_ended(run=self.run, epoch=epoch)

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the weights to evaluate; see `Optimizer.evaluating`."""
        return self.parts.optimizer.evaluating()

    def reference(self) -> nn.Module:
        """Return the frozen model that the recipe's `reference` names, before the first step.

        `auto` is the base without the fresh adapter, or, if `adapter_from` gives its weights, the policy as it begins.
        """
        fresh, named, adapter = self.recipe.adapter_from is None, str(self.recipe.reference), self.parts.adapter
        now = None if self.begun is None else copy_state(adapter.state())
        if now is not None and self.begun is not None:
            adapter.load_state(self.begun)
        try:
            return freeze_policy(self.model, adapter, named, switchable=self.parts.switchable, fresh=fresh)
        finally:
            if now is not None:
                adapter.load_state(now)

    def _save(self, epoch: float, *, ended: bool) -> None:
        """Write a checkpoint that `generate` and `merge` open as one of Luthier's own loop."""
        run, parts = self.run, self.parts
        run.control.begin_save()
        tally = {
            **{"step": run.step, "total_steps": run.total_steps, "epoch": epoch, "ended": ended, "best_step": None},
            **{"tokens": self.tokens, "samples": self.samples, "evaluation": self.evaluation},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "penalties": torch.tensor(self.penalties, dtype=torch.float64),
            "stop_reason": run.stop_reason if ended else None,
        }
        own = collect_state(parts.adapter, self.optimizer, {"quantizer": parts.quantizer}, parts.callbacks)
        tree, step = {**own, "tally": tally, "trainer": parts.trainer.state()}, run.step
        parts.saver.save(step, tree, None, lambda path: parts.hooks.saved(run=run, step=step, path=path))
