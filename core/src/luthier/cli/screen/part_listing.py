"""The rows of `luthier plugins`: every installed part, its state, and the problems that `--check` finds."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Any

import attrs

import luthier
from luthier.plugins import registry, requirements
from luthier.plugins.registry import Offer, Plugins


@attrs.frozen(kw_only=True)
class Row:
    """One part, or one plugin whose parts are not known, which has no kind."""

    kind: str | None
    name: str
    distribution: str
    version: str
    summary: str
    state: str  # ok | conflict | broken | blocked | unsupported
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return attrs.asdict(self)

    @property
    def fails(self) -> bool:
        return self.state in ("conflict", "broken")

    def __str__(self) -> str:
        return f"{self.kind or 'plugin'} {self.name} of {self.distribution} {self.version}"


def list_parts(plugins: Plugins) -> list[Row]:
    """Return the parts by kind and name, then plugins that failed to load or are blocked."""
    sourceless = [
        *((failure.source, "broken", failure.cause) for failure in plugins.failures),
        *((source, "blocked", f"named in {registry.BLOCK}") for source in plugins.skipped),
    ]
    return [_row(offer) for offer in plugins.offers()] + [
        Row(
            kind=None,
            name=source.plugin,
            distribution=source.distribution,
            version=source.version,
            summary="",
            state=state,
            reason=reason,
        )
        for source, state, reason in sourceless
    ]


def checked_rows() -> list[Row]:
    """Return the rows after further checks.

    A plugin whose requirement of luthier is not met is reported without importing it; a part whose implementation
    cannot be found is broken.
    """
    unfit = {}
    for entry in metadata.entry_points(group=registry.GROUP):
        reason = requirements.unmet_requirement(entry.dist.requires or (), luthier.__version__) if entry.dist else None
        if entry.dist and reason:
            unfit[entry.dist.name] = reason
    plugins = Plugins(blocked=Plugins(autoload=False).blocked | unfit.keys())
    return [
        attrs.evolve(row, state="broken", reason=unfit[row.distribution])
        if row.distribution in unfit
        else _found(row, plugins)
        for row in list_parts(plugins)
    ]


def _row(offer: Offer) -> Row:
    record, source = offer.record, offer.source
    state, reason = "ok", None
    if "packing" in record.conflicts:  # the only tag that every run provides unless it is told not to
        state, reason = "unsupported", "packing; it is refused unless the recipe says packing: false"
    if offer.rivals:
        state, reason = "conflict", f"also offered by {', '.join(str(rival) for rival in offer.rivals)}"
    return Row(
        kind=record.kind,
        name=record.name,
        distribution=source.distribution,
        version=source.version,
        summary=record.summary,
        state=state,
        reason=reason,
    )


def _found(row: Row, plugins: Plugins) -> Row:
    """Return the row, broken if no module has the name in its record's `build`."""
    if row.state != "ok" or row.kind is None:
        return row
    module = plugins.get(row.kind, row.name).record.build.partition(":")[0]
    try:
        missing = importlib.util.find_spec(module) is None
    except ImportError:
        missing = True
    return attrs.evolve(row, state="broken", reason=f"there is no module {module}") if missing else row
