"""The outside packages: each built as a wheel and installed into a folder of its own for the tests that ask for it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from luthier.cli.app import app
from luthier.logs import set_up
from luthier.plugins.registry import installed_plugins
from typer.testing import CliRunner

HERE = Path(__file__).resolve().parent
BUILD = "import sys; from flit_core import buildapi; print(buildapi.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="session")
def outside_folder(tmp_path_factory):
    """`outside_folder(name)`: a folder that holds the installed package `tests/outside/<name>`, built once."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp(f"outside-{name}")
            words = [sys.executable, "-c", BUILD, wheels]
            done = subprocess.run(words, cwd=HERE / name, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            with zipfile.ZipFile(wheels / done.stdout.strip()) as wheel:
                wheel.extractall(folder)
            folders[name] = folder
        return folders[name]

    return folder_of


@pytest.fixture
def run_luthier(monkeypatch):
    """`run_luthier("plugins", "--json")` in process: click's result, whose `document` is the JSON on stdout."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        result.document = json.loads(result.stdout) if "--json" in words else None
        return result

    yield run
    set_up("warning")


@pytest.fixture
def install_outside(outside_folder, monkeypatch):
    """`install_outside(*names)` installs these packages for one test, in this process and in those it starts.

    A path in the place of a name is the folder of an installed package.
    An installed operation is active without being named, so no outside package may be there for the other tests.
    """

    def install(*names):
        folders = [str(name if isinstance(name, Path) else outside_folder(name)) for name in names]
        for folder in folders:
            monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])]))
        importlib.invalidate_caches()
        installed_plugins.cache_clear()
        return folders

    yield install
    monkeypatch.undo()
    importlib.invalidate_caches()
    installed_plugins.cache_clear()
    for name in [name for name in sys.modules if name.startswith("luthier_outside_")]:
        del sys.modules[name]
