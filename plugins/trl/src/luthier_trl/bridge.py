"""The bridge: it reports the steps of TRL's loop to a session of Luthier."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import transformers
from luthier import TrainerSession
from trl.trainer.utils import RepeatSampler

from luthier_trl.loop_state import epochs_read, keep_state, restore_scheduler, restore_window
from luthier_trl.rewards import ROW


class Connection:
    """A mixin for TRL's trainers, which sends no telemetry and keeps the loss and the rows of each step.

    It precedes TRL's class in the bases, so that `super` is TRL's class.
    """

    session: TrainerSession
    step_loss = 0.0
    step_rows: frozenset[int] = frozenset()  # numbers of the rows of the step
    readied = 0  # number of calls of `gradients_ready`
    kept: Mapping[str, Any] | None = None  # the loop's state, in a run that goes on

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        loss = self._above().training_step(model, inputs, *arguments, **named)
        self.step_loss += float(loss.detach())
        self.step_rows |= set(inputs[ROW] if isinstance(inputs, Mapping) else [row[ROW] for row in inputs])
        return loss

    def evaluate(self, *arguments: Any, **named: Any) -> Any:
        with self.session.evaluating():
            return self._above().evaluate(*arguments, **named)

    def _clip_grad_norm(self, model: Any) -> Any:
        self._ready()
        return self._above()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # nothing is clipped
            self._ready()
        return self._above()._get_grad_norm(model, grad_norm)

    def _ready(self) -> None:
        self.session.gradients_ready()
        self.readied += 1

    def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
        sampler = self._above()._get_train_sampler(*arguments, **named)
        for _ in range(epochs_read(self.kept)):
            if isinstance(sampler, RepeatSampler):  # whose orders are drawn one after the other
                next(iter(sampler), None)
        return sampler

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """The session has put the weights back."""

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        if self.kept is not None:
            restore_scheduler(self, self.kept)

    def _load_scaler(self, checkpoint: Any) -> None:
        """There is none."""

    def _load_rng_state(self, checkpoint: Any) -> None:
        """The session sets the random states of each step."""

    def _load_callback_state(self) -> None:
        """The session's callbacks have theirs."""

    def _above(self) -> Any:
        return super()

    def take_step(self) -> tuple[float, int]:
        """Return the loss since the last call, and the number of rows."""
        loss, samples = self.step_loss, len(self.step_rows)
        self.step_loss, self.step_rows = 0.0, frozenset()
        return loss, samples


def connected_trainer(trainer_class: type, session: TrainerSession) -> Any:
    """Return a subclass of one of TRL's trainers that reports to a session."""
    return type(f"Connected{trainer_class.__name__}", (Connection, trainer_class), {"session": session})


class SessionCallback(transformers.TrainerCallback):
    """The callback that reports each step to a session, and passes the run's requests to TRL's loop."""

    def __init__(self, session: TrainerSession) -> None:
        self.session, self.tokens, self.logs = session, 0, False
        self.trainer: Any = None

    def state(self) -> dict[str, Any]:
        """Return the state of the loop within the end of a step."""
        return keep_state(self.trainer, logs=self.logs or self.session.run.stop_reason is not None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.session.begin(state.max_steps)
        self.tokens = int(state.num_input_tokens_seen or 0)
        if self.trainer.kept is not None:
            restore_window(self.trainer, self.trainer.kept)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.session.step_started(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        session, seen, trainer = self.session, int(state.num_input_tokens_seen or 0), self.trainer
        assert trainer.readied == 1, "this version of transformers clips gradients in another way"
        self.logs, trainer.readied = control.should_log or state.global_step >= state.max_steps, 0
        loss, samples = trainer.take_step()
        session.step_ended(loss, float(state.epoch or 0.0), samples=samples, tokens=max(seen - self.tokens, 0))
        self.tokens = seen
        ends = session.run.stop_reason is not None or state.global_step >= state.max_steps
        control.should_training_stop |= ends
        control.should_log |= ends
        control.should_evaluate |= bool(session.validation) and (ends or session.wants_evaluation)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        known = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, numbers.Real)}
        if "train_runtime" not in known and not any(name.startswith("eval_") for name in known):
            self.session.logged(known)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        known = (metrics or {}).items()
        self.session.evaluated({name: float(value) for name, value in known if isinstance(value, numbers.Real)})

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.session.epoch_ended(max(round(float(state.epoch or 0.0)) - 1, 0))
