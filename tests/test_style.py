"""Style: ruff, with the settings of pyproject.toml, finds nothing to say and nothing to lay out."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_ruff(*words, text=None):
    command = [sys.executable, "-m", "ruff", *words]
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_ruff_finds_nothing_to_say():
    status, said = run_ruff("check", "--no-cache", "--output-format", "concise", ".")
    assert status == 0, said


def test_every_file_is_laid_out_as_ruff_does_it():
    status, said = run_ruff("format", "--no-cache", "--check", ".")
    assert status == 0, said


PLANTED = {
    "F401": "import os\n",
    "ANN001": "def add(number) -> int:\n    return number + 1\n",
    "E501": f"LINE = '{'x' * 120}'\n",
}


@pytest.mark.parametrize("code", PLANTED)
def test_ruff_finds_a_planted_offender(code):
    name = "core/src/luthier/planted.py"
    status, said = run_ruff("check", "--output-format", "concise", "--stdin-filename", name, "-", text=PLANTED[code])
    assert status == 1
    assert code in said
