"""Which parts go together: derived from tags, never from a matrix of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from luthier.errors import LuthierError


@attrs.frozen(kw_only=True)
class Chosen:
    """A part as compatibility sees it."""

    kind: str
    name: str
    needs: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    conflicts: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


def refusals(chosen: Sequence[Chosen], given: Mapping[str, str]) -> list[str]:
    """Why these parts do not go together, one sentence for each reason; empty when they do.

    `given` maps tags that no part provides to who does: the data, the model, the device or the run.
    """
    reasons = []
    for part in chosen:
        others = {tag: str(o) for o in chosen if o is not part for tag in sorted(o.provides)}
        provided = {**given, **others}
        for tag in sorted(part.needs - provided.keys()):
            rivals = [str(o) for o in chosen if o is not part and o.kind == _giver(tag)]
            blame = f", which {rivals[0]} does not provide" if rivals else ", which nothing chosen provides"
            reasons.append(f"{part} needs {tag}{blame}")
        for tag in sorted(part.conflicts & provided.keys()):
            reasons.append(f"{part} does not work with {tag}, which {provided[tag]} provides")
    return reasons


def check(chosen: Sequence[Chosen], given: Mapping[str, str]) -> None:
    """Raise `part-incompatible` with every reason."""
    reasons = refusals(chosen, given)
    if reasons:
        raise LuthierError("part-incompatible", "; ".join(reasons))


def _giver(tag: str) -> str:
    """The kind one would look to for a tag."""
    kinds = {"dense-weights": "quantizer", "quantized-base": "quantizer", "reference": "adapter", "closure": "run"}
    return kinds.get(tag, "adapter")
