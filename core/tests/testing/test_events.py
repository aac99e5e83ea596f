"""The kit's picture of a run is the loop's: the same events in the same order, with the same names in their numbers."""

from __future__ import annotations

import luthier
import pytest
from luthier.plugins.events import EVENTS, Events, event
from luthier.testing.event_orders import Stage, copy_values, differing_values, heard_events, play_run
from luthier.testing.worlds import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"{i} plus {j} is", "completion": str(i + j)} for i in range(2) for j in range(4)]


def recorder(asks=None):
    """A callback that writes down each event with the names of its numbers, and asks for a stop after step `asks`."""
    seen = []

    def write(name):
        if "metrics" in vars(Events)[name].__code__.co_varnames:
            return lambda metrics: seen.append((name, sorted(n for n in metrics if not n.startswith("seconds/"))))
        return lambda: seen.append((name, None))

    functions = {name: write(name) for name in EVENTS if name != "step_started"}

    def step_started(run, step):
        seen.append(("step_started", None))
        if step == asks:
            run.request_stop("enough")

    return luthier.on(**functions, step_started=step_started), seen


def trained(folder, callback, **settings):
    return luthier.train(
        model=(tiny_model(), tiny_tokenizer()),
        data=ROWS,
        eval_data=ROWS[:2],
        exact_callbacks=[callback],
        global_batch_size=4,
        num_train_epochs=2,
        eval_on_start=True,
        device="cpu",
        output_dir=str(folder / "run"),
        **{"async_save": False, **settings},
    )


def test_a_whole_run_fires_what_the_kit_plays(tmp_path):
    real, played = recorder(), recorder()
    trained(tmp_path, real[0], eval_steps=2, save_steps=2)
    play_run(played[0], tmp_path)
    assert [name for name, _ in played[1]] == [name for name, _ in real[1]]
    assert played[1] == real[1]


def test_a_checkpoint_in_the_background_is_told_of_late_and_nothing_else_changes(tmp_path):
    (at_once, seen), (later, heard_late) = recorder(), recorder()
    trained(tmp_path / "a", at_once, eval_steps=2, save_steps=2)
    trained(tmp_path / "b", later, eval_steps=2, save_steps=2, async_save=True)
    plain = [[name for name, _ in told if name != "saved"] for told in (seen, heard_late)]
    places = [[i for i, (name, _) in enumerate(told) if name == "saved"] for told in (seen, heard_late)]
    assert plain[0] == plain[1]
    assert all(one <= other for one, other in zip(*places, strict=True))
    assert heard_late[-3:] == seen[-3:]


def test_a_run_that_is_asked_to_stop_fires_what_the_kit_plays(tmp_path):
    real, played = recorder(asks=2), recorder(asks=2)
    trained(tmp_path, real[0], eval_steps=2)
    play_run(played[0], tmp_path)
    assert [name for name, _ in played[1]] == [name for name, _ in real[1]]


def test_a_resumed_run_fires_what_the_kit_plays(tmp_path):
    class Cut(Exception):
        """What ends the first process."""

    def cut(step):
        if step == 3:
            raise Cut

    with pytest.raises(Cut):
        trained(tmp_path, luthier.on(step_ended=cut), save_steps=2, eval_steps=2)
    real, played = recorder(), recorder()
    trained(tmp_path, real[0], save_steps=2, eval_steps=2)
    stage = Stage(played[0], tmp_path, step=2)
    stage.go_on()
    for _ in range(2):
        if stage.train_step():
            stage.saved()
    stage.end_task()
    stage.complete()
    assert [name for name, _ in played[1]] == [name for name, _ in real[1]]


def test_a_failing_callback_is_shown_with_the_events_before_it(tmp_path):
    def fail(step):
        raise KeyError(step)

    with pytest.raises(KeyError) as caught:
        play_run(luthier.on(logged=fail), tmp_path)
    (note,) = caught.value.__notes__
    assert note.endswith("run_started, task_started, evaluated, step_started, step_ended, logged")


def test_an_event_that_is_not_marked_is_named():
    class Unmarked:
        def logged(self, metrics): ...

    with pytest.raises(AssertionError, match=r"logged of Unmarked is not marked with @luthier.event"):
        heard_events(Unmarked())


def test_a_callback_that_hears_nothing_is_named():
    with pytest.raises(AssertionError, match="listens to no event"):
        heard_events(object())


def test_a_snapshot_sees_what_changes_in_an_object_and_in_its_class():
    class Counting:
        counts: list = []

        def __init__(self):
            self.own = {"a": 1}

        @event
        def logged(self): ...

    part = Counting()
    before = copy_values(part)
    assert differing_values(before, copy_values(part)) == []
    part.own["a"] = 2
    Counting.counts.append(1)
    assert differing_values(before, copy_values(part)) == ["counts", "own"]
