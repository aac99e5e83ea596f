"""Hollow models: where a model is sharded, rank 0 alone reads its weights; the others hold shapes until theirs come.

The whole model is in the host memory of rank 0 while it is handed out, and in that of nobody else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch

from luthier.distributed.spread import Strategy
from luthier.distributed.world import World
from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.model.model_config import build_model, config_of
from luthier.plugins.contracts.values import Purpose
from luthier.step.attach import HOST

if TYPE_CHECKING:
    from luthier.memory.case import Case
    from luthier.recipe import Recipe
    from luthier.recipe.settled import SettledRecipe

log = get_logger()
META: Final = torch.device("meta")


def load_quantized(
    case: Case, recipe: SettledRecipe, strategy: Strategy, world: World, quantized: Callable[[torch.device], Any]
) -> tuple[Any, Purpose]:
    """Return the model with its quantizer applied, as `quantized(device)` makes it; and its purpose."""
    if strategy != "fsdp":
        return quantized(case.device), case.purpose
    reason = None if world.is_main else _why_not(case, recipe)
    reasons = [text for text in world.gather(reason) if text]
    if reasons:
        log.warning("every rank reads all the weights, as the parts cannot do without", reason=reasons[0])
    if world.is_main or reason:
        return quantized(HOST), case.purpose
    return quantized(META), "hollow"


def hollow_model(recipe: Recipe) -> Any:
    """Return the recipe's model without weights."""
    return build_model(config_of(recipe.model), recipe.model, META)


def _why_not(case: Case, recipe: SettledRecipe) -> str | None:
    """Return why copies of the parts cannot be attached to a model without weights, or None."""
    from luthier.memory.dry_run import Unknown, assemble_weightless, rehearsed_parts
    from luthier.memory.isolation import isolated_parts
    from luthier.model.operations.kernel_choice import find_kernels

    try:
        kernels = find_kernels(recipe, case.resolved, case.device)
        parts = attrs.evolve(rehearsed_parts(case.resolved), kernels=kernels)
        with isolated_parts(parts.objects(), case.resolved.plugins.packages):
            assemble_weightless(recipe, hollow_model(case.recipe), parts, case.prepared, META, "hollow", case.task)
    except (LuthierError, Unknown, RuntimeError, TypeError, ValueError) as error:
        return str(error).splitlines()[0]
    return None
