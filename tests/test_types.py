"""Types: mypy, with the settings of pyproject.toml, finds no error in any member, and finds those that are planted."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(
    path.parent / "src"
    for pattern in ("core", "kernels", "plugins/*", "contrib/*")
    for path in ROOT.glob(f"{pattern}/pyproject.toml")
)


def run_mypy(*words):
    """The exit status of mypy with the project's settings, and what it said."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(1800)  # 90 s of one core where nothing is cached, and other tests share it
def test_mypy_finds_no_error_in_any_member():
    status, said = run_mypy(*FOLDERS)
    assert status == 0, said[-10_000:]


PLANTED = {
    "a wrong argument": "len(3)",
    "an attribute that is not there": "'text'.size",
    "a None that is not looked at": "re.match('a', 'b')[0]",
    "an error in a function without annotations": "def add(one): return one + len(3)",
    "an ignore without need": "one: int = 1  # type: ignore[assignment]",
    "an ignore without its code": "two: int = 'two'  # type: ignore",
}


def test_mypy_finds_each_planted_error(tmp_path):
    path = tmp_path / "planted.py"
    path.write_text("\n".join(["import re", *PLANTED.values(), ""]))
    status, said = run_mypy("--cache-dir", tmp_path / "cache", path)
    lines = {int(line.split("planted.py:")[1].split(":")[0]) for line in said.splitlines() if "planted.py:" in line}
    assert status == 1
    assert {what: number in lines for number, what in enumerate(PLANTED, 2)} == dict.fromkeys(PLANTED, True), said
