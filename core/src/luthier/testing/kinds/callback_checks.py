"""Checks of callbacks: they accept every order of events, change nothing, and keep the states of runs apart."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any, Final

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from luthier.errors import LuthierError
from luthier.testing.event_orders import TOTAL, Stage, copy_values, differing_values, heard_events, play_run, played_run
from luthier.testing.laws import Subject, law
from luthier.testing.strategies import bases_of, options_of

FEW: Final = 3
# what is due after one step
PLANS: Final = st.fixed_dictionaries({due: st.booleans() for due in ("log", "evaluate", "save")})
ROWS: Final = [{"prompt": f"{i} plus {j} is", "completion": str(i + j)} for i in range(3) for j in range(3)]


@law(0)
def tolerates_every_event_order_the_loop_can_produce(subject: Subject) -> None:
    """No order of events that the loop can produce makes it raise: started or resumed, stopped, killed, failed."""
    from luthier.testing.running import example_settings

    for options in bases_of(subject.options_class, subject.own_examples):
        live(subject, options)
    run_state_machine_as_test(_machine(subject), settings=example_settings(10, stateful_step_count=15))


class Processes(RuleBasedStateMachine):
    """The processes of one run, one after another, in the orders that `luthier.plugins.events` draws.

    `phase` is ready (no event has fired), training, or over; `kept` is the newest checkpoint: its step and state.
    """

    subject: Subject
    bases: list[Any]

    def open_run(self, options: Any) -> None:
        self.options = options
        self.kept: Any = None
        self.holder = tempfile.TemporaryDirectory()
        self.start_process()

    def start_process(self) -> None:
        try:
            part = self.subject.build(self.options)
        except LuthierError:
            if self.options in self.bases:
                raise
            hypothesis.reject()
        heard_events(part)
        step = self.kept[0] if self.kept else 0
        self.stage, self.phase = Stage(part, Path(self.holder.name), step), "ready"

    @property
    def ending(self) -> bool:
        return self.stage.run.step == TOTAL or self.stage.run.stop_reason is not None

    def keep(self) -> None:
        self.kept = (self.stage.run.step, _state(self.stage.part))
        self.stage.saved()

    @precondition(lambda self: self.phase == "ready" and self.kept is None)
    @rule(evaluate=st.booleans())
    def begin(self, evaluate: bool) -> None:
        self.stage.begin(evaluate=evaluate)
        self.phase = "training"

    @precondition(lambda self: self.phase == "ready" and self.kept is not None)
    @rule()
    def resume(self) -> None:
        if self.kept[1] is not None:
            self.stage.part.load_state(self.kept[1])
        self.stage.go_on()
        self.phase = "training"

    @precondition(lambda self: self.phase == "training" and not self.ending)
    @rule(plans=st.lists(PLANS, min_size=1))
    def take_steps(self, plans: list[dict[str, bool]]) -> None:
        for plan in plans:
            if not self.ending and self.stage.train_step(**plan):
                self.keep()

    @precondition(lambda self: self.phase == "training" and self.ending)
    @rule()
    def finish(self) -> None:
        self.stage.end_task()
        self.stage.complete()
        self.phase = "over"

    @precondition(lambda self: self.phase != "over")
    @rule(by=st.sampled_from(("signal", "error", "kill")))
    def interrupt(self, by: str) -> None:
        """End the process, with a checkpoint, an event or neither, perhaps before the first event; it may resume."""
        if by == "error":
            self.stage.fail()
        elif by == "signal" and self.phase == "training" and self.stage.run.step > 0:
            self.keep()
            self.stage.interrupt()
        self.start_process()

    @precondition(lambda self: self.phase == "over")
    @rule()
    def train_again(self) -> None:
        """Begin another run in the same process, with another callback."""
        self.holder.cleanup()
        self.open_run(self.options)

    def teardown(self) -> None:
        if hasattr(self, "holder"):
            self.holder.cleanup()


def _machine(subject: Subject) -> type[Processes]:
    own = subject.own_examples
    starts = bases_of(subject.options_class, own)
    drawn = options_of(subject.options_class, own) if subject.vary else st.sampled_from(starts)

    class Drawn(Processes):
        @initialize(options=drawn)
        def begin_run(self, options: Any) -> None:
            self.open_run(options)

    Drawn.subject, Drawn.bases = subject, starts
    return Drawn


def _state(part: Any) -> dict[str, Any] | None:
    from luthier.testing.states import carry_tree

    return carry_tree(part.state()) if hasattr(part, "state") else None


@law(FEW)
def changes_nothing_it_is_shown(subject: Subject, options: Any) -> None:
    """After each event the metrics and the run's settings are unchanged; it acts only by `request_...`."""
    part = subject.build(options)

    class Watched(Stage):
        def fire(self, name: str, **arguments: Any) -> None:
            shown = (self.run.settings, self.run.step, self.run.total_steps, arguments.get("metrics"))
            before = copy.deepcopy(shown)
            super().fire(name, **arguments)
            after = (self.run.settings, self.run.step, self.run.total_steps, arguments.get("metrics"))
            assert after == before, f"{name} changed what it was shown: {before} became {after}"

    with tempfile.TemporaryDirectory() as folder:
        play_run(part, Path(folder), kind=Watched)


@law(1, default_only=True)
def changes_no_parameter(subject: Subject, options: Any) -> None:
    """A real run with the callback has the losses and the final weights of the run without it, bit for bit."""
    plain, watched = _trained([]), _trained([subject.build(options)])
    steps = len(watched.loss_history)
    assert watched.loss_history == plain.loss_history[:steps], "the losses differ from those of a run without it"
    if steps < len(plain.loss_history):  # it asked for a stop, which it may
        return
    pairs = zip(plain.model.named_parameters(), watched.model.named_parameters(), strict=True)
    changed = [name for (name, one), (_, two) in pairs if not one.equal(two)]
    assert not changed, f"weights that differ from those of a run without it: {', '.join(changed[:4])}"


def _trained(callbacks: list[Any]) -> Any:
    import luthier
    from luthier.testing.worlds import tiny_model, tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        run = luthier.train(
            model=(tiny_model(), tiny_tokenizer()),
            data=ROWS,
            eval_data=ROWS[:2],
            exact_callbacks=callbacks,
            max_steps=3,
            eval_steps=1,
            global_batch_size=4,
            device="cpu",
            output_dir=str(Path(folder) / "run"),
        )
        run.model  # noqa: B018 - held in this process, as the folder will be gone
        return run


@law(FEW)
def two_runs_do_not_share_state(subject: Subject, options: Any) -> None:
    """One run changes nothing in the callback of another run."""
    one, two = subject.build(options), subject.build(options)
    before, state = copy_values(two), _state(two)
    played_run(one)
    changed = differing_values(before, copy_values(two))
    assert not changed, f"a run changed {', '.join(changed)} of another run's callback"
    if state is not None:
        changed = differing_values(state, _state(two) or {})
        assert not changed, f"a run changed {', '.join(changed)} in the state of another run's callback"


@law(FEW)
def state_is_tensors_and_json(subject: Subject, options: Any) -> None:
    """`state()`, if there is one, returns tensors and JSON values, and `load_state` restores them."""
    part = subject.build(options)
    both = hasattr(part, "state"), hasattr(part, "load_state")
    assert both[0] == both[1], "state and load_state come together, or not at all"
    if not both[0]:
        return
    played_run(part, steps=3)
    state, fresh = _state(part), subject.build(options)
    fresh.load_state(copy.deepcopy(state))
    changed = differing_values(_comparable(state or {}), _comparable(_state(fresh) or {}))
    assert not changed, f"{', '.join(changed)} came back from load_state with another value"


def _comparable(tree: Any) -> Any:
    """Return tensors as lists, which compare as a whole."""
    if hasattr(tree, "tolist"):
        return tree.tolist()
    if isinstance(tree, dict):
        return {k: _comparable(v) for k, v in tree.items()}
    return [_comparable(v) for v in tree] if isinstance(tree, list) else tree


def live(subject: Subject, options: Any) -> None:
    """Send a callback all events of a run, of a resumed run, and of a run that fails."""
    part, resumed = subject.build(options), subject.build(options)
    with tempfile.TemporaryDirectory() as folder:
        play_run(part, Path(folder))
        state = _state(part)
        if state is not None:
            resumed.load_state(state)
        stage = Stage(resumed, Path(folder), step=2)
        stage.go_on()
        stage.train_step(evaluate=True)
        stage.saved(step=2)
        stage.fail()
