"""The tutorial, carried out: its files written, its edits made, its commands run, its output found.

A fence's first line says what becomes of it: `sh` is run; `title="path"` is a new file; `in="path"` is an excerpt that the
file must hold, or, of a `diff`, an edit of it; `text` are lines that the commands before it print, in this order.
"""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
FENCE = re.compile(r'^```(?P<kind>\w+)(?: (?P<what>title|in)="(?P<path>[^"]+)")?\n(?P<body>.*?)^```$', re.M | re.S)
EDIT = """
import sys
path, before, after = sys.argv[1:]
text = open(path, encoding="utf-8").read()
assert text.count(before) == 1, f"{path} holds {text.count(before)} times:\\n{before}"
open(path, "w", encoding="utf-8").write(text.replace(before, after))
"""


def blocks():
    return [match.groupdict() for match in FENCE.finditer(PAGE.read_text("utf-8"))]


def quoted(text):
    return "'" + text.replace("'", "'\\''") + "'"


def edited(block):
    """What a diff or an excerpt finds, and what it leaves."""
    if block["kind"] != "diff":
        return block["body"], block["body"]
    lines = [(line[:1], line[1:] + "\n") for line in block["body"].splitlines()]
    return tuple("".join(text for sign, text in lines if sign != other) for other in "+-")


def script():
    """The page as one bash script, in which the commands of block number N print into the file out-N."""
    parts = ["set -euo pipefail"]
    for number, block in enumerate(blocks()):
        if block["kind"] == "sh":
            parts.append(f"{{\n{block['body']}}} > out-{number} 2>&1")
        elif block["what"] == "title":
            parts.append(f"printf %s {quoted(block['body'])} > {block['path']}")
        elif block["what"] == "in":
            before, after = edited(block)
            parts.append(f"python edit.py {block['path']} {quoted(before)} {quoted(after)}")
    return "\n".join(parts)


def environment(folder):
    """A Python environment of its own, over the one that runs the tests: what it installs stays in it."""
    venv.create(folder, with_pip=False)
    site = sysconfig.get_path("purelib", vars={"base": str(folder)})
    outer = sysconfig.get_path("purelib")
    (Path(site) / "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
    for command, module in (("luthier", "luthier"), ("pip", "pip"), ("pytest", "pytest")):
        shim = folder / "bin" / command
        shim.write_text(f'#!/bin/sh\nexec "{folder}/bin/python" -m {module} "$@"\n')
        shim.chmod(0o755)
    settings = {"PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return {**os.environ, **settings, **offline, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory):
    """The folder in which the whole page was carried out."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "edit.py").write_text(EDIT)
    done = subprocess.run(
        ["bash", "-c", script()],
        cwd=folder,
        env=environment(tmp_path_factory.mktemp("environment")),
        capture_output=True,
        text=True,
        check=False,
    )
    printed = "".join(f"== {p.name}\n{p.read_text()[-3000:]}" for p in sorted(folder.glob("out-*"), key=_number))
    assert done.returncode == 0, f"{done.stderr[-2000:]}\n{printed[-8000:]}"
    return folder


def _number(path):
    return int(path.name.removeprefix("out-"))


@pytest.mark.slow
def test_every_command_edit_and_excerpt_of_the_tutorial_holds(carried_out):
    assert {p.name for p in (carried_out / "runs").iterdir()} == {"warm", "cool", "plain"}


@pytest.mark.slow
def test_every_output_that_the_tutorial_shows_is_printed(carried_out):
    last = None
    for number, block in enumerate(blocks()):
        if block["kind"] == "sh":
            last = (carried_out / f"out-{number}").read_text()
        elif block["kind"] == "text":
            rest = last
            for line in block["body"].splitlines():
                assert line in rest, f"{line!r} is not in the output:\n{last[-3000:]}"
                rest = rest.partition(line)[2]


def test_every_block_of_the_tutorial_says_what_becomes_of_it():
    fences = PAGE.read_text("utf-8").count("\n```")
    found = blocks()
    assert 2 * len(found) == fences
    assert all(b["kind"] in ("sh", "text") or b["what"] for b in found)
    assert sys.version_info >= (3, 11)
