"""Checks of trainers: what they say of a recipe, and what their session sees of two short runs on a tiny model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.plugins.completion import has_default
from luthier.plugins.events import event
from luthier.testing.laws import Subject, law, not_run

ROWS: Final = [{"prompt": text, "answer": text[::-1]} for text in ("One", "Two", "Three", "Four", "Five", "Six")]
STEPS: Final = 2
SETTINGS: Final[dict[str, Any]] = {  # of a run of the kit's, where the trainer reads them
    "max_steps": STEPS, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "global_batch_size": 2,
    "max_tokens_per_device": 4096, "logging_steps": 1, "data.max_length": 32,
}  # fmt: skip


@law(0, needs_torch=False)
def lists_settings_that_a_recipe_has(subject: Subject) -> None:
    """Every name in the record's `settings` is a setting of a recipe, written as there."""
    from luthier.recipe.schema import setting_names

    unknown = sorted(set(subject.record.settings) - setting_names())  # type: ignore[attr-defined]
    assert not unknown, f"no recipe has the setting {', '.join(unknown)}"


@law(1, default_only=True)
def leaves_the_recipe_alone(subject: Subject, options: Any) -> None:
    """`check` and `check_rows` change nothing of the recipe and the rows, and write no file."""
    from luthier.data.prompt_rows import PromptRow
    from luthier.recipe import Recipe

    part = _Held(subject, options)
    with _inside_a_folder() as folder:
        given = {**_settings(subject), "model": "demo", "data": {"path": "rows.jsonl"}, "trainer": part}
        recipe = Recipe.from_dict(_nested(given))
        rows = [PromptRow(prompt=row["prompt"], columns={"answer": row["answer"]}, where="rows.jsonl") for row in ROWS]
        before, texts = recipe.to_dict(), repr(rows)
        part.check(recipe)
        part.check_rows(recipe, rows, [])
        assert recipe.to_dict() == before, "the recipe is another afterwards"
        assert repr(rows) == texts, "the rows are others afterwards"
        assert not list(folder.iterdir()), f"it writes {', '.join(path.name for path in folder.iterdir())}"


@law(1, default_only=True)
def tells_each_step_in_order(subject: Subject, options: Any) -> None:
    """The session hears of the start once, and of each step from 1: start, gradients, one optimizer step, end."""
    seen = _run(subject, options).seen
    steps = sum(line.startswith("end ") for line in seen)
    wanted = [f"begin {steps}"]
    for step in range(1, steps + 1):
        wanted += [f"start {step}", "gradients", "optimizer", f"end {step}"]
    assert seen == wanted, f"the session saw: {', '.join(seen)}"
    if "max_steps" in subject.record.settings:  # type: ignore[attr-defined]
        assert steps == STEPS, f"{steps} steps where max_steps is {STEPS}"


@law(1, default_only=True)
def trains_the_weights(subject: Subject, options: Any) -> None:
    """Losses are finite, and weights have changed when the run has ended."""
    outcome = _run(subject, options)
    assert all(map(math.isfinite, outcome.losses)), f"not finite: {outcome.losses}"
    assert outcome.moved, "no weight has changed"


@law(1, default_only=True)
def ends_where_it_is_asked(subject: Subject, options: Any) -> None:
    """A run that is asked to stop within its first step takes no second one."""
    seen = _run(subject, options, stop_in=1).seen
    assert "start 2" not in seen, "it was asked to stop within step 1, and began step 2"


@law(1, default_only=True)
def is_the_same_with_the_same_seed(subject: Subject, options: Any) -> None:
    """Two runs of one recipe have the same losses."""
    first, second = _run(subject, options).losses, _run(subject, options).losses
    assert first == second, f"losses of {first}, then of {second}"


@law(1, default_only=True)
def resumes_exactly(subject: Subject, options: Any) -> None:
    """A run that is cut off within its second step goes on to the losses of a whole one, for a trainer with `state`."""
    if has_default(subject.build(options), "trainer", "state"):
        not_run("it keeps no state: its runs begin anew")
    whole, resumed = _run(subject, options), _run(subject, options, cut_in=2)
    assert resumed.losses == whole.losses, f"losses of {resumed.losses}, and of {whole.losses} in one go"


def live(subject: Subject, options: Any) -> None:
    """A life of the part: a short run."""
    _run(subject, options)


@attrs.define(kw_only=True)
class _Found:
    """The observations of a run: its session's reports, its losses, and whether a weight has changed."""

    seen: list[str] = attrs.field(factory=list)
    losses: list[float] = attrs.field(factory=list)
    moved: bool = False


class _Held:
    """The part as an object that is passed in Python, with what its record says."""

    def __init__(self, subject: Subject, options: Any) -> None:
        record: Any = subject.record
        self.part = subject.build(options)
        self.settings, self.needs = record.settings, record.needs
        self.provides, self.conflicts = record.provides, record.conflicts
        self.check, self.check_rows, self.train = self.part.check, self.part.check_rows, self.part.train
        if not has_default(self.part, "trainer", "state"):
            self.state = self.part.state


class _Cut(Exception):
    """The end of a run in the middle of a step."""


class _Watcher:
    """A callback that writes down what it hears, and stops the run within one step, or cuts it off there."""

    def __init__(self, record: _Found, stop_in: int | None, cut_in: int | None) -> None:
        self.found, self.stop_in, self.cut_in = record, stop_in, cut_in

    @event
    def run_started(self, run: Any) -> None:
        self.found.seen.append(f"begin {run.total_steps}")

    @event
    def step_started(self, run: Any, step: int) -> None:
        self.found.seen.append(f"start {step}")
        if step == self.stop_in:
            run.request_stop("the kit asks for it")
        if step == self.cut_in:
            raise _Cut

    @event
    def step_ended(self, run: Any, step: int) -> None:
        self.found.seen.append(f"end {step}")


def _run(subject: Subject, options: Any, stop_in: int | None = None, cut_in: int | None = None) -> _Found:
    """A run on a tiny model, every weight of which trains; after a cut the run that goes on from there."""
    import contextlib

    from luthier.testing.worlds import save_tiny_model

    with _inside_a_folder() as folder:
        save_tiny_model(folder / "model")
        if cut_in is not None:
            with contextlib.suppress(_Cut):
                _trained(subject, options, folder, stop_in, cut_in)
        return _trained(subject, options, folder, stop_in, None)


def _trained(subject: Subject, options: Any, folder: Path, stop_in: int | None, cut_in: int | None) -> _Found:
    import luthier

    outcome = _Found()
    adapter, optimizer = _watched_parts(outcome)
    run = luthier.train(
        model=folder / "model", data=ROWS, trainer=_Held(subject, options), adapter=adapter, optimizer=optimizer,
        callbacks=[_Watcher(outcome, stop_in, cut_in)], output_dir=folder / "run", save_steps=1, save_final=False,
        device="cpu", **_settings(subject),
    )  # fmt: skip
    outcome.losses = run.loss_history
    return outcome


def _watched_parts(record: _Found) -> tuple[Any, Any]:
    """Full tuning and AdamW, which write down when their hooks are called."""
    import torch

    from luthier.builtin import AdamW
    from luthier.builtin.full import FullTuning
    from luthier.builtin.optimizers import FusedAdamW
    from luthier.plugins.records import NoOptions

    class WatchedTuning(FullTuning):
        provides = frozenset(("trainable-weights",))

        def attach(self, model: Any, context: Any) -> Any:
            attached = super().attach(model, context)
            self.began = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
            return attached

        def end_task(self, index: int, total: int) -> None:
            record.moved = any(not torch.equal(self.began[name], p) for name, p in self.model.named_parameters())

        def gradients_ready(self) -> None:
            record.seen.append("gradients")

    class WatchedAdamW(FusedAdamW):
        def build(self, groups: Any) -> torch.optim.Optimizer:
            optimizer = super().build(groups)
            optimizer.register_step_post_hook(lambda *_: record.seen.append("optimizer"))
            return optimizer

    return WatchedTuning(NoOptions()), WatchedAdamW(AdamW(weight_decay=0.0))


def _settings(subject: Subject) -> dict[str, Any]:
    read = subject.record.settings  # type: ignore[attr-defined]
    return {name: value for name, value in SETTINGS.items() if name in read}


def _nested(given: dict[str, Any]) -> dict[str, Any]:
    """The same settings as a recipe's tree has them."""
    tree = {name: value for name, value in given.items() if not name.startswith("data.")}
    return {**tree, "data": {**tree["data"], **{n[5:]: v for n, v in given.items() if n.startswith("data.")}}}


@contextmanager
def _inside_a_folder() -> Iterator[Path]:
    """Stand in a fresh folder, so that a file that is written by a relative path is found."""
    import contextlib

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield Path(folder)
