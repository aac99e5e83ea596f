"""Help: quick, light, and complete."""

import os
import subprocess
import sys

import pytest
from luthier.cli.app import app
from typer.main import get_command

HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "numpy", "wandb", "mlflow", "openai"}
MODULES = 300  # that the general help imports beside the interpreter's own: typer and rich are most of them
BOUND = 0.3  # seconds of CPU time, user and system, of the best of seven on a quiet machine


def cpu_seconds(line):
    before = os.times()
    subprocess.run(line, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def verbs_of(group):
    for name, command in group.commands.items():
        yield name, command
        yield from verbs_of(command) if hasattr(command, "commands") else ()


def test_the_list_of_verbs_cuts_no_sentence_at_80_columns():
    room = 80 - 2 - 6 - len("new-plugin")  # click's margins, and the longest name
    assert [name for name, verb in verbs_of(get_command(app)) if verb.get_short_help_str(room).endswith("...")] == []


@pytest.mark.slow  # a time, which other work on the machine lengthens; the number of modules says the same
def test_help_takes_at_most_its_bound_of_cpu_time():
    best = min(cpu_seconds([sys.executable, "-m", "luthier", "--help"]) for _ in range(7))
    assert best <= BOUND


def test_the_general_help_imports_few_modules():
    source = (
        "import sys\n"
        "before = len(sys.modules)\n"
        "from luthier.cli import main\n"
        "sys.argv = ['luthier', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit:\n    print('', len(sys.modules) - before, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    assert int(result.stderr.split()[-1]) <= MODULES


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["train", "--adapter", "full", "--help"], ["plugins"], ["new-plugin"]]
)
def test_help_and_lists_load_no_heavy_library(words):
    source = (
        "import sys\n"
        "from luthier.cli import main\n"
        f"sys.argv = ['luthier', *{words!r}]\n"
        "try:\n    main()\n"
        "except SystemExit:\n    print('', *{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    loaded = set(result.stderr.splitlines()[-1].split())
    assert "luthier" in loaded
    assert not HEAVY & loaded


def test_help_lists_every_verb(luthier):
    text = luthier("--help").stdout
    for verb in (
        "demo",
        "train",
        "plan",
        "inspect",
        "generate",
        "merge",
        "runs",
        "checkpoint",
        "presets",
        "plugins",
        "doctor",
        "new-plugin",
    ):
        assert any(line.split()[:1] == [verb] for line in text.splitlines()), verb


def test_no_argument_is_help(luthier):
    assert luthier().stdout == luthier("--help").stdout
    assert luthier().status == 0
