"""The bridge: what TRL's loop tells of its steps, as a session of Luthier's takes it."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import transformers
from luthier import TrainerSession

from luthier_trl.rewards import ROW


class Connection:
    """What a subclass of one of TRL's trainers does besides: no telemetry is sent, each step's loss and rows are kept.

    It stands before TRL's class, so that `super` is that.
    """

    session: TrainerSession
    step_loss = 0.0
    step_rows: frozenset[int] = frozenset()  # numbers of the rows that the step was given
    readied = 0  # how often the adapter was told of its gradients

    def _send_telemetry(self) -> None:
        """Say nothing to anybody."""

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

    def _above(self) -> Any:
        return super()

    def take_step(self) -> tuple[float, int]:
        """Return the loss since the last call, and the number of rows."""
        loss, samples = self.step_loss, len(self.step_rows)
        self.step_loss, self.step_rows = 0.0, frozenset()
        return loss, samples


def connected_trainer(trainer_class: type, session: TrainerSession) -> Any:
    """Return a subclass of one of TRL's trainers that is connected with a session."""
    return type(f"Connected{trainer_class.__name__}", (Connection, trainer_class), {"session": session})


class SessionCallback(transformers.TrainerCallback):
    """Tells a session of each step, and TRL's loop of what the session's run is asked."""

    def __init__(self, session: TrainerSession) -> None:
        self.session, self.trainer, self.tokens = session, None, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.session.begin(state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.session.step_started(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        session, seen = self.session, int(state.num_input_tokens_seen or 0)
        trainer: Any = self.trainer
        assert trainer.readied == state.global_step, "this version of transformers clips gradients in another way"
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
