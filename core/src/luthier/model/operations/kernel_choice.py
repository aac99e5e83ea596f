"""The choice of installed operations for a run: which there are, which the run may use, kept as a decision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import torch

from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.model.operations.guard import GuardedOperation
from luthier.model.operations.install_operations import Installed, installed_operations, ordinary_operations
from luthier.model.operations.signatures import REFERENCES, Implementation, Operations
from luthier.recipe.checks.soundness import given_tags

if TYPE_CHECKING:
    from luthier.plugins.contracts.values import Purpose
    from luthier.plugins.registry import Offer
    from luthier.recipe import Recipe
    from luthier.recipe.parts import Resolved
    from luthier.runs.writing.decisions import Decisions

log = get_logger()
KERNELS: Final = "kernels"
DROPPED: Final = "kernels_dropped"


def find_kernels(recipe: Recipe, resolved: Resolved, device: torch.device) -> list[Implementation]:
    """Return the installed operations that the run may use, built, the preferred first.

    Raises `operation-failed` under `kernels: require` where one cannot be built, or where there is none, and
    `recipe-conflict` where `torch_compile: true` asks for what `kernels: reference` leaves out.
    """
    if recipe.kernels == "reference":
        if recipe.torch_compile is True:
            raise LuthierError("recipe-conflict", "torch_compile: true compiles what kernels: reference leaves plain",
                               where=KERNELS, remedy="Leave one of the two out.")  # fmt: skip
        return []
    required = recipe.kernels == "require"
    offers = [offer for offer in resolved.plugins.offers("operation") if _has_needs(offer, recipe, resolved, device)]
    made = [_implementation(resolved, offer, required) for offer in offers]
    kernels = sorted(filter(None, made), key=lambda one: (-one.priority, one.name))
    if required and not kernels:
        remedy = "Install a distribution with operations for this device, or set kernels: auto."
        raise LuthierError("operation-failed", "no installed operation can be used here", where=KERNELS, remedy=remedy)
    return kernels


def operate_as_chosen(
    recipe: Recipe,
    model: Any,
    kernels: Sequence[Implementation],
    decisions: Decisions,
    purpose: Purpose,
    spread_as: str,
) -> AbstractContextManager[Installed]:
    """Let the model compute by the run's operations inside the context; `kernels` are those that were found."""
    has_values = purpose in ("train", "open") or spread_as == "fsdp"  # a "hollow" rank gets its weights later
    operations = choose_kernels(kernels, recipe, decisions, has_values=has_values)
    return installed_operations(model, operations, verified=has_values)


def choose_kernels(
    installed: Sequence[Implementation], recipe: Recipe, decisions: Decisions, *, has_values: bool
) -> Operations:
    """Return the operations of the run: with the installed ones that it began with, where it is resumed.

    Without values, as in a plan, it is only noted where those would be used.
    """
    operations = Operations() if recipe.kernels == "reference" else ordinary_operations()
    operations.stands_in = not has_values
    names = [str(one) for one in installed]
    reason = f"kernels: {recipe.kernels}" if installed or recipe.kernels == "reference" else "none is installed"
    taken = decisions.take(KERNELS, lambda: (names, reason), usable=lambda held: set(held) <= set(names))
    if taken:  # a run that began without operations resumes without them, even if one was installed meanwhile
        operations.prefer(_undropped([one for one in installed if str(one) in taken], decisions))
    return operations


def _undropped(installed: Sequence[Implementation], decisions: Decisions) -> list[Implementation]:
    """Return those that have not raised in this run; what raises from now on is noted."""
    dropped = set(decisions.take(DROPPED, lambda: ([], "none has raised")))

    def fall(name: str, why: str) -> None:
        dropped.add(name)
        decisions.explicit(DROPPED, sorted(dropped), why)

    for one in installed:
        assert one.guard is not None
        one.guard.on_fall = fall
    return [one for one in installed if one.name not in dropped]


def _has_needs(offer: Offer, recipe: Recipe, resolved: Resolved, device: torch.device) -> bool:
    chosen = resolved.chosen()
    given = set(given_tags(recipe, device.type, chosen)).union(*(part.provides for part in chosen))
    missing = sorted(offer.record.needs - given)
    if missing:
        log.info("operation left out", implementation=offer.record.name, needs=", ".join(missing))
    return not missing


def _implementation(resolved: Resolved, offer: Offer, required: bool) -> Implementation | None:
    record: Any = offer.record
    owner = f"{offer.source.distribution} {offer.source.version}"
    try:
        offer = resolved.plugins.get("operation", record.name)  # raises if two distributions claim the name
        function = resolved.plugins.build(offer, resolved.plugins.options(offer)())
        supports = resolved.plugins.resolve(offer, record.predicate)
    except LuthierError as error:
        if required or error.code == "part-ambiguous":
            raise
        log.warning("operation fell back", name=record.operation, implementation=record.name, reason=error.line)
        return None
    guard = GuardedOperation(
        record=record,
        owner=owner,
        function=function,
        reference=REFERENCES[record.operation],
        supports=supports,
        required=required,
    )
    return Implementation(
        operation=record.operation,
        name=record.name,
        function=guard.compute,
        supports=supports,
        priority=record.priority,
        guard=guard,
    )
