"""Whether a plugin's declared requirement of luthier is met, read from its metadata before it is imported."""

from __future__ import annotations

from importlib import metadata


def unmet(distribution: str, installed: str) -> str | None:
    """The requirement that version `installed` of luthier does not meet, or None where all are met."""
    from packaging.requirements import Requirement

    for text in metadata.requires(distribution) or ():
        requirement = Requirement(text)
        if requirement.name != "luthier" or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            return f"luthier{requirement.specifier}"
    return None
