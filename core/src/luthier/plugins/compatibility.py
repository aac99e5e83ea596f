"""The compatibility of parts, derived from their tags and never from a table of pairs of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from luthier.errors import LuthierError


@attrs.frozen(kw_only=True)
class Chosen:
    """A part of the recipe, reduced to what the check of compatibility reads: its name and its tags."""

    kind: str
    name: str
    needs: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    conflicts: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


def refusals(chosen: Sequence[Chosen], given: Mapping[str, str]) -> list[str]:
    """Return why these parts do not go together, one sentence for each reason; an empty list if they do.

    `given` maps each tag that no part provides to its provider: the data, the model, the device or the run.
    """
    reasons = []
    for part in chosen:
        others = {tag: str(o) for o in chosen if o is not part for tag in sorted(o.provides)}
        provided = {**given, **others}
        reasons += [f"{part} needs {tag}, which {_lacking(tag, part, chosen)}" for tag in part.needs - provided.keys()]
        reasons += [
            f"{part} does not work with {tag}, which {provided[tag]} provides"
            for tag in part.conflicts & provided.keys()
        ]
    return sorted(reasons)


def check_compatibility(chosen: Sequence[Chosen], given: Mapping[str, str]) -> None:
    """Raise `part-incompatible` with every reason if the parts do not go together."""
    reasons = refusals(chosen, given)
    if reasons:
        given_by_user = [WAYS[tag] for tag in sorted(_lacking_tags(chosen, given)) if tag in WAYS]
        raise LuthierError("part-incompatible", "; ".join(reasons), remedy=" ".join(given_by_user) or None)


WAYS: Final = {  # tags that a user's own choice provides -> how it is written
    "teacher": "Write teacher: MODEL, which is a hub's name, a model's folder, a run's folder, or demo; or teacher: "
    "{model: MODEL, quantizer: ..., adapter: ...}; or choose another loss.",
    "dense-weights": "Leave the quantizer out, or choose an adapter that trains beside quantized weights, such as "
    "lora.",
}
GIVERS: Final = {
    "dense-weights": "quantizer",
    "quantized-base": "quantizer",
    "rounded-activations": "quantizer",
    "trainable-weights": "adapter",
    "reference": "adapter",
    "paired-data": "the data",
    "unpaired-data": "the data",
    "calibration-data": "the data",
    "teacher": "the recipe",
    "packing": "the recipe",
    "cuda": "the device",
    "multi-rank": "the device",
    "closure": "the run",
}


def _lacking_tags(chosen: Sequence[Chosen], given: Mapping[str, str]) -> set[str]:
    provided = set(given).union(*(part.provides for part in chosen))
    return {tag for part in chosen for tag in part.needs} - provided


def _lacking(tag: str, part: Chosen, chosen: Sequence[Chosen]) -> str:
    """Return who should provide a tag and does not: a part of the kind that can, or "the data" and the like."""
    giver = GIVERS.get(tag, "")
    rivals = [str(other) for other in chosen if other is not part and other.kind == giver]
    if rivals:
        return f"{rivals[0]} does not provide"
    return f"{giver} does not provide" if giver.startswith("the ") else "nothing chosen provides"
