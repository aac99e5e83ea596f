"""Types: mypy, with the settings of pyproject.toml, finds no error in any member, and every wheel says it is typed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = sorted(
    path.parent
    for pattern in ("core", "kernels", "plugins/*", "contrib/*")
    for path in ROOT.glob(f"{pattern}/pyproject.toml")
)
TYPED = "py.typed"  # of PEP 561: who imports the package may check types against it


def run_mypy(*words):
    """The exit status of mypy with the project's settings, and its last lines."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()[-60:]


@pytest.mark.timeout(1800)  # 90 s of one core where nothing is cached, and other tests share it
def test_mypy_finds_no_error_in_any_member():
    status, lines = run_mypy(*(member / "src" for member in MEMBERS))
    assert status == 0, "\n".join(lines)


PLANTED = {
    "a wrong argument": "def double(number: int) -> int:\n    return 2 * number\n\n\ndouble('two')\n",
    "an error in a function without annotations": "def add(one):\n    return one + len(3)\n",
    "a None that is not looked at": "import re\n\n\ndef first(text: str) -> str:\n    return re.match('a', text)[0]\n",
    "an ignore without need": "number: int = 1  # type: ignore[assignment]\n",
    "an ignore without its code": "number: int = 'one'  # type: ignore\n",
}


@pytest.mark.parametrize("what", PLANTED)
def test_mypy_finds_a_planted_error(what, tmp_path):
    path = tmp_path / "planted.py"
    path.write_text(PLANTED[what])
    status, lines = run_mypy("--cache-dir", tmp_path / "cache", path)
    assert status == 1, lines
    assert any(line.startswith(str(path)) or line.startswith("planted.py") or "planted.py:" in line for line in lines)


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_a_wheel_says_that_it_is_typed(member, tmp_path):
    build = "import sys; from flit_core import buildapi; print(buildapi.build_wheel(sys.argv[1]))"
    words = [sys.executable, "-c", build, str(tmp_path)]
    done = subprocess.run(words, cwd=member, capture_output=True, text=True, check=True)
    names = zipfile.ZipFile(tmp_path / done.stdout.strip()).namelist()
    packages = {name.partition("/")[0] for name in names if name.endswith("/__init__.py")}
    assert all(f"{package}/{TYPED}" in names for package in packages)
