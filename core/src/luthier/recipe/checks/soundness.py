"""The check that a recipe's parts go together, by their tags and by what the run itself provides. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.errors import LuthierError
from luthier.plugins import compatibility
from luthier.plugins.options import is_default
from luthier.recipe.checks.other_models import other_model_tags
from luthier.recipe.checks.unread_options import check_unread_by_parts

if TYPE_CHECKING:
    from luthier.plugins.compatibility import Chosen
    from luthier.recipe.parts import Resolved
    from luthier.recipe.schema import Settings


def given_tags(recipe: Settings, device: str, chosen: list[Chosen]) -> dict[str, str]:
    """Return the tags that no part provides, with their providers.

    `device` is cpu, cuda, mps, or auto for the tags of all.
    """
    given = {"calibration-data": "the training data", **other_model_tags(recipe, chosen)}
    if all(part.kind != "trainer" for part in chosen):
        given["closure"] = "the run"
    if recipe.packing:
        given["packing"] = "the run (packing: true)"
    if device in ("cuda", "auto"):
        given["cuda"] = "the device"
    return given


def check_parts(recipe: Settings, resolved: Resolved, device: str) -> None:
    """Raise `part-incompatible` if parts do not go together, and `part-unsupported` if they cannot train here.

    Raises `artifact-unmergeable` if a merged model is asked for and a part's record says that none can be made.
    """
    chosen = resolved.chosen()
    compatibility.check_compatibility(chosen, given_tags(recipe, device, chosen))
    provider = resolved.provider
    if provider.record is not None and "luthier:in-process" not in provider.record.provides:
        problem = f"provider {provider.name!r} does not train in this process"
        remedy = "Submit it with `luthier submit RECIPE`, or use provider: local."
        raise LuthierError("part-unsupported", problem, where="provider", remedy=remedy)
    if provider.record is not None and not is_default(provider.options):
        problem = "a provider's options are read by `luthier submit`, not by a run in this process"
        remedy = "Submit it with `luthier submit RECIPE`, or leave them out."
        raise LuthierError("part-unsupported", problem, where="provider", remedy=remedy)
    check_unread_by_parts(recipe, resolved)
    _check_batch(recipe, resolved)
    for part in (resolved.adapter, resolved.quantizer) if recipe.merge else ():
        if not getattr(part.record or part.local, "mergeable", True):
            raise unmergeable_part(part.kind, part.name, where="merge")


def _check_batch(recipe: Settings, resolved: Resolved) -> None:
    """Raise `recipe-conflict` if the global batch has too few units for a loss that compares them."""
    least, size = getattr(resolved.loss.record or resolved.loss.local, "least_batch", 1), recipe.global_batch_size
    if isinstance(size, int) and size < least:
        problem = f"the loss {resolved.loss.name!r} compares the units of a global batch"
        remedy = f"Set it to {least} or more."
        raise LuthierError("recipe-conflict", problem, where="global_batch_size", found=size, remedy=remedy)


def check_stored_base(chosen: Sequence[Chosen]) -> None:
    """Raise `part-incompatible` where a part needs dense weights of a checkpoint that is quantized itself."""
    if any(part.kind == "quantizer" and "quantized-base" in part.provides for part in chosen):
        return  # which says for itself that it wants a dense checkpoint
    reasons = [f"{part} needs dense-weights" for part in chosen if "dense-weights" in part.needs]
    reasons += [f"{part} does not work with quantized-base" for part in chosen if "quantized-base" in part.conflicts]
    if reasons:
        problem = f"{'; '.join(reasons)}, and the checkpoint is quantized"
        remedy = "Begin from its dense original, or use an adapter such as lora."
        raise LuthierError("part-incompatible", problem, where="model", remedy=remedy)


def check_built_parts(adapter: Any, quantizer: Any, resolved: Resolved) -> None:
    """Raise `artifact-unmergeable` if a part, now that it is attached, says that nothing can be merged with it."""
    for part, chosen in ((adapter, resolved.adapter), (quantizer, resolved.quantizer)):
        if not getattr(part, "mergeable", True):
            raise unmergeable_part(chosen.kind, chosen.name, where="merge")


def unmergeable_part(kind: str, name: str, where: str | None = None) -> LuthierError:
    """Return the error for a part whose record says that nothing can be merged with it."""
    remedy = "Leave merge out: generate and evaluate open the run's own artifact."
    return LuthierError("artifact-unmergeable", f"{kind} {name!r} cannot be merged", where=where, remedy=remedy)


def explain_parts(recipe: Settings, resolved: Resolved, device: str) -> list[dict[str, Any]]:
    """Return for each part what it needs and who provides it, what it provides, and what it does not work with."""
    chosen = resolved.chosen()
    given = given_tags(recipe, device, chosen)
    return [
        {
            "kind": part.kind,
            "name": part.name,
            "needs": {
                tag: next((str(o) for o in chosen if o is not part and tag in o.provides), given.get(tag))
                for tag in part.needs
            },
            "provides": sorted(part.provides),
            "conflicts": sorted(part.conflicts),
        }
        for part in chosen
    ]
