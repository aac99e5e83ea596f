"""The events: their picture agrees with their signatures, and a callback that misses one is told so."""

import inspect
import re

import luthier
import pluggy
import pytest
from luthier import LuthierError, event
from luthier.plugins import events, hookspecs
from luthier.plugins.events import EVENTS, Events, check_callback


def test_the_picture_shows_every_event_with_its_arguments_in_order():
    drawn = re.findall(r"^\s+(\w+)\((run[\w, ]*)\)", events.__doc__, re.M)
    assert [name for name, _ in drawn] == list(EVENTS)
    for name, arguments in drawn:
        assert arguments.split(", ") == list(inspect.signature(getattr(Events, name)).parameters)[1:]


def test_the_events_are_those_of_the_design():
    assert set(EVENTS) == set(
        [
            "run_started",
            "resumed",
            "step_started",
            "step_ended",
            "logged",
            "evaluated",
            "epoch_ended",
            "saved",
            "task_started",
            "task_ended",
            "stopped",
            "completed",
            "failed",
        ]
    )
    assert all(getattr(Events, name).__doc__ for name in EVENTS)


def test_every_hook_is_specified_and_documented():
    manager = pluggy.PluginManager("luthier")
    manager.add_hookspecs(hookspecs)
    for name in hookspecs.HOOKS.values():
        assert getattr(manager.hook, name).spec
        assert inspect.getdoc(getattr(hookspecs, name))
        assert getattr(hookspecs, name)() == ()


class Good:
    @event
    def step_ended(self, step, metrics):
        pass

    def state(self):
        return {}


class Misspelt:
    @event
    def step_end(self, step):
        pass


class Unmarked:
    @event
    def saved(self, path):
        pass

    def step_ended(self, step):
        pass


class Greedy:
    @event
    def saved(self, folder):
        pass


class Deaf:
    def state(self):
        return {}


@pytest.mark.parametrize("callback", [Good(), luthier.on(step_ended=lambda step: None, saved=lambda: None)])
def test_a_callback_with_a_marked_event_is_taken(callback):
    assert check_callback(callback, "here") is None


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        (Misspelt(), ("here", "step_end", "'step_ended'")),
        (Unmarked(), ("here", "step_ended", "@luthier.event")),
        (Greedy(), ("folder",)),
        (Deaf(), ("here",)),
        ("text", ("here",)),
        (None, ("here",)),
    ],
    ids=range(6),
)
def test_a_callback_that_would_miss_an_event_is_refused(callback, says):
    with pytest.raises(LuthierError) as caught:
        check_callback(callback, "here")
    assert caught.value.code == "part-invalid"
    assert all(fact in str(caught.value) for fact in says)


def test_a_callback_declares_only_what_it_uses():
    seen = []

    class Few:
        @event
        def logged(self, metrics):
            seen.append(metrics)

    manager = pluggy.PluginManager("luthier-events")
    manager.add_hookspecs(Events)
    manager.register(Few())
    manager.hook.logged(run=None, step=3, metrics={"loss": 1.0})
    assert seen == [{"loss": 1.0}]
