"""Try the ends of the members' ranges: `python -m tests.versions lowest|newest`, from the root of the repository.

It makes a fresh environment with the lowest or the newest versions that the ranges admit (torch stays the one that
the tests pin), runs the tests that a new version of a library breaks first, and prints what it found.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
RESOLVER = "uv>=0.5"
TOOLS = ("pytest-timeout", "pytest-xdist", "flit_core", "packaging")
TESTS = (  # what touches other libraries most: models, recognition, attention, saving, adapters, trackers, the command
    "core/tests/plugins",
    "core/tests/recipe",
    "core/tests/cli/test_plugins.py",
    "core/tests/model/test_operations_install.py",
    "core/tests/model/test_operations_offered.py",
    "core/tests/model/test_attention.py",
    "core/tests/model/test_policy.py",
    "core/tests/checkpoint/test_saving.py",
    "plugins/lora/tests/test_attach.py",
    "plugins/tensorboard",
    "plugins/wandb",
    "plugins/mlflow",
    "plugins/trackio",
    "tests/test_lora_training.py",
    "tests/test_peft_training.py",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__.splitlines()[0])
    parser.add_argument("end", choices=("lowest", "newest"))
    parser.add_argument("--folder", type=Path, help="Where the environment is made; without it, a temporary folder.")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="Other tests than the compatibility ones.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return try_versions(given.end, given.folder or Path(temporary) / "environment", given.tests)


def try_versions(end: str, folder: Path, tests: list[str]) -> int:
    """Make the environment, run the tests in it, and return their exit status."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "-q", "--upgrade", "pip"])
    pins = [*pinned_torch(), *(lowest_versions(python) if end == "lowest" else [])]
    (folder / "pins.txt").write_text("".join(f"{pin}\n" for pin in pins))
    members = [word for line in editable_lines() for word in ("-e", line)]
    run([python, "-m", "pip", "install", "-q", "-c", folder / "pins.txt", *pinned_torch(), *members, *TOOLS])
    print(f"{end} versions of what the members require:", flush=True)
    names = [canonicalize_name(requirement.name) for requirement in member_requirements()]
    show = [python, "-m", "pip", "list", "--format=freeze"]
    listed = subprocess.run(show, check=True, capture_output=True, text=True).stdout.splitlines()
    print("\n".join(f"  {line}" for line in listed if canonicalize_name(line.partition("==")[0]) in names), flush=True)
    done = subprocess.run([python, "-m", "pytest", "-q", *tests], cwd=ROOT, check=False)
    print(f"{end}: {'every test passed' if done.returncode == 0 else 'tests failed'}")
    return done.returncode


def run(words: list[object]) -> None:
    subprocess.run([str(word) for word in words], cwd=ROOT, check=True)


def pinned_torch() -> list[str]:
    text = (ROOT / "tests" / "requirements.txt").read_text("utf-8")
    return re.findall(r"^torch==\S+$", text, re.M)


def editable_lines() -> list[str]:
    """The members, with the extras that their tests need; but no extra that asks for one version of a vendor's SDK."""
    lines = re.findall(r"^-e (\S+)$", (ROOT / "tests" / "requirements.txt").read_text("utf-8"), re.M)
    return [line.partition("[")[0] if has_exact_extra(line) else line for line in lines]


def has_exact_extra(line: str) -> bool:
    folder, _, extras = line.partition("[")
    optional = tomllib.loads((ROOT / folder / "pyproject.toml").read_text("utf-8"))["project"]
    texts = [optional.get("optional-dependencies", {}).get(name, []) for name in extras.rstrip("]").split(",")]
    return any("==" in text.partition(";")[0] for group in texts for text in group)


def member_requirements() -> list[Requirement]:
    """What the members require, and the extras that the tests install, but one another."""
    found = []
    for line in editable_lines():
        folder, _, extras = line.partition("[")
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text("utf-8"))["project"]
        optional = project.get("optional-dependencies", {})
        wanted = [name for name in extras.rstrip("]").split(",") if name]
        found += map(Requirement, [*project["dependencies"], *(text for name in wanted for text in optional[name])])
    here = [one for one in found if one.marker is None or one.marker.evaluate()]
    return [one for one in here if not one.name.startswith("luthier")]


def lowest_versions(python: Path) -> list[str]:
    """Return `name==version` of the lowest releases that every member's range admits together.

    Raises `SystemExit` where a member's range begins lower than what can be installed beside the others.
    """
    run([python, "-m", "pip", "install", "-q", RESOLVER])
    wanted = python.parent / "members.txt"
    wanted.write_text("".join(f"{requirement}\n" for requirement in [*pinned_torch(), *member_requirements()]))
    plain = ("--no-header", "--no-annotate", "--resolution", "lowest-direct")
    resolve = [str(python.parent / "uv"), "pip", "compile", "-q", *plain, str(wanted)]
    answer = subprocess.run(resolve, check=True, capture_output=True, text=True).stdout
    names = {canonicalize_name(requirement.name) for requirement in member_requirements()}
    pins = [line for line in answer.splitlines() if canonicalize_name(line.partition("==")[0]) in names - {"torch"}]
    high = [problem for line in pins for problem in begins_too_low(line)]
    if high:
        raise SystemExit("ranges begin lower than what can be installed:\n" + "\n".join(high))
    return pins


def begins_too_low(pin: str) -> list[str]:
    """Return what is wrong with the range of a library, of which `pin` is the lowest version that can be installed."""
    name, _, version = pin.partition("==")
    bounds = [
        bound.version
        for requirement in member_requirements()
        if canonicalize_name(requirement.name) == canonicalize_name(name)
        for bound in requirement.specifier
        if bound.operator == ">="
    ]
    low = max(bounds, key=Version, default=version)
    reached = Version(version).release[: len(Version(low).release)] == Version(low).release
    return [] if reached else [f"  {name}>={low}: {version} is the lowest beside the others"]


if __name__ == "__main__":
    sys.exit(main())
