"""The declared requirements of distributions, read from their metadata before any of their modules is imported."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata


def unmet_requirement(requires: Iterable[str], installed: str) -> str | None:
    """Return why version `installed` of luthier does not meet what a distribution requires; None where it does."""
    from packaging.requirements import InvalidRequirement, Requirement

    for text in requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            return f"its requirement {text!r} cannot be read"
        if requirement.name != "luthier" or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            return f"it needs luthier{requirement.specifier}, and {installed} is installed"
    return None


def of_extra(distribution: str, extra: str) -> list[str]:
    """Return the names of the distributions that an extra installs, as in `of_extra("luthier", "local")`."""
    from packaging.requirements import Requirement

    declared = [Requirement(text) for text in metadata.requires(distribution) or ()]
    return [r.name for r in declared if r.marker and r.marker.evaluate({"extra": extra}) and "extra" in str(r.marker)]
