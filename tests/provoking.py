"""A world in which errors are provoked, and what every one of them must say."""

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import luthier
import pytest
from luthier import LuthierError
from luthier.cli.app import app
from luthier.errors import CODES
from luthier.plugins.registry import installed_plugins
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
OFFER = """
import attrs
from luthier import CallbackRecord, hookimpl

@attrs.frozen(kw_only=True)
class Options:
    pass

@hookimpl
def luthier_callbacks():
    return [CallbackRecord(name="{name}", summary="Made up.", options=Options, build="{module}:{attribute}")]
"""
WATCHERS = """
import os, signal
import luthier

def failing(options):
    def end():
        raise RuntimeError("a defect")
    return luthier.on(step_ended=end)

def terminating(options):
    def end():
        os.kill(os.getpid(), signal.SIGTERM)
    return luthier.on(step_ended=end)
"""


class World:
    """A folder with a tiny model and rows, runs on them, the command line, and distributions made on the spot."""

    def __init__(self, folder, model, path):
        self.folder, self.model, self._path = folder, model, path
        self.rows = self.file("rows.jsonl", [chat_row(i) for i in range(16)])
        self.settings = {"model": str(model), "data": str(self.rows), "adapter": "lora", "exact_callbacks": ["jsonl"],
                         "global_batch_size": 8, "output_dir": folder / "run"}  # fmt: skip

    def train(self, **changes):
        return luthier.train(**{**self.settings, **changes})

    def file(self, name, content):
        """A file of text, bytes, or rows."""
        path = self.folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
        return path

    def recipe(self, **changes):
        return self.file(
            "recipe.json", json.dumps({**self.settings, "output_dir": str(self.folder / "run"), **changes})
        )

    def command(self, *words):
        """The error that the command prints as JSON; its exit status is the code's."""
        installed_plugins.cache_clear()
        result = CliRunner().invoke(app, [str(w) for w in (*words, "--json")])
        told = json.loads(result.stdout)["error"]
        assert result.exit_code == (143 if told["code"] == "interrupted" else CODES[told["code"]].exit_status)
        return told

    def distribution(self, name, source):
        """An installed distribution, of which one module is the plugin."""
        site, module = self.folder / "site", name.replace("-", "_")
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[luthier]\n{name.removeprefix('luthier-')} = {module}\n")
        self._path.syspath_prepend(str(site))

    def watcher(self, attribute):
        """A callback `made-up` of the command line's."""
        self.distribution("luthier-made-up", OFFER.format(name="made-up", module="watchers", attribute=attribute))
        (self.folder / "site/watchers.py").write_text(WATCHERS)


def chat_row(number):
    question = {"role": "user", "content": f"{number}?"}
    return {"messages": [question, {"role": "assistant", "content": str(number + 1)}]}


@contextmanager
def made_world(folder, model, path):
    yield World(folder, model, path)
    installed_plugins.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("luthier_made", "luthier_other", "watchers"))]:
        del sys.modules[name]


PROVOKED = []


def provokes(code, *fragments):
    """Marks what provokes a code; the message must hold the fragments, in this order."""

    def mark(function):
        PROVOKED.append((code, function, fragments))
        return function

    return mark


def cases_of(module):
    """Parametrize a test with what a module's functions provoke: code, act and fragments of the message."""
    cases = [case for case in PROVOKED if case[1].__module__ == module]
    return pytest.mark.parametrize(("code", "act", "fragments"), cases, ids=[act.__name__ for _, act, _ in cases])


def check_error(world, code, act, fragments):
    """The error has its code, its fragments in their order, and a remedy."""
    told = _told(act, world)
    assert told["code"] == code, told
    rest = told["message"]
    for fragment in fragments:
        assert fragment in rest, told["message"]
        rest = rest.partition(fragment)[2]
    assert told["remedy"]
    assert told["message"].endswith(f"[{code}]")
    assert told.keys() == {"code", "message", "problem", "where", "found", "remedy"}


def _told(act, world):
    """The error as plain data: raised, or printed by a command."""
    try:
        return act(world)
    except LuthierError as error:
        return error.to_dict()


def stop_run(world, **changes):
    """A run with a checkpoint of its first step, in the output folder."""
    with pytest.raises(Exception, match="SIGTERM"):
        world.train(
            exact_callbacks=["jsonl", luthier.on(step_ended=lambda: os.kill(os.getpid(), signal.SIGTERM))], **changes
        )
    return world.folder / "run"
