"""What the tests are run with: every distribution that a member needs is pinned, and within the members' ranges."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
NOT_PINNED = ("luthier",)  # the members themselves


def requirement_lines(name):
    lines = (ROOT / "tests" / name).read_text("utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("#", "-"))]


def pins():
    found = {}
    for line in [*requirement_lines("constraints.txt"), *requirement_lines("requirements.txt")]:
        requirement = Requirement(line)
        exact = [s.version for s in requirement.specifier if s.operator == "=="]
        if exact:
            found.setdefault(canonicalize_name(requirement.name), set()).update(exact)
    return found


def member_requirements():
    """(member, requirement) for everything that a member or one of its extras needs here."""
    for path in sorted(ROOT.glob("*/pyproject.toml")) + sorted(ROOT.glob("*/*/pyproject.toml")):
        project = tomllib.loads(path.read_text("utf-8"))["project"]
        extras = project.get("optional-dependencies", {}).values()
        for text in [*project.get("dependencies", ()), *(text for extra in extras for text in extra)]:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate():
                yield project["name"], requirement


def test_everything_that_the_tests_need_is_pinned_to_one_version():
    wanted = [canonicalize_name(requirement.name) for _, requirement in member_requirements()]
    wanted += [canonicalize_name(Requirement(line).name) for line in requirement_lines("requirements.txt")]
    found, seen = pins(), set()
    while wanted:
        name = wanted.pop()
        if name in seen or name.startswith(NOT_PINNED):
            continue
        seen.add(name)
        assert name in found, f"{name} is not in tests/constraints.txt"
        try:
            texts = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        environment = {**default_environment(), "extra": ""}
        for requirement in map(Requirement, texts):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                wanted.append(canonicalize_name(requirement.name))
    assert {name: versions for name, versions in found.items() if len(versions) > 1} == {}


def test_the_pinned_versions_are_within_the_members_ranges():
    found = pins()
    wrong = [
        f"{name}: {requirement}"
        for name, requirement in member_requirements()
        for version in found.get(canonicalize_name(requirement.name), ())
        if not requirement.specifier.contains(version, prereleases=True)
    ]
    assert wrong == []


@pytest.mark.parametrize("name", ["constraints.txt", "requirements.txt"])
def test_requirements_name_no_place_of_one_machine(name):
    assert not re.search(r"file:|/home/|\+cpu", (ROOT / "tests" / name).read_text("utf-8"))
