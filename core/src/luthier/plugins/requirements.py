"""What distributions declare that they need, read from their metadata before anything of them is imported."""

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


def of_extra(distribution: str, extra: str) -> list[str]:
    """The names of the distributions that an extra brings: `of_extra("luthier", "local")`."""
    from packaging.requirements import Requirement

    declared = [Requirement(text) for text in metadata.requires(distribution) or ()]
    return [r.name for r in declared if r.marker and r.marker.evaluate({"extra": extra}) and "extra" in str(r.marker)]
