"""Checks of a recipe's settings against each other, which no single option can make."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from luthier.errors import LuthierError
from luthier.recipe.checks.modes import check_blocks, check_mode, check_streaming
from luthier.recipe.checks.other_models import check_other_models
from luthier.recipe.checks.saving_checks import check_saving
from luthier.recipe.checks.unread_options import check_unread

if TYPE_CHECKING:
    from luthier.recipe.schema import Settings

DEVICE: Final = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def check_contradictions(recipe: Settings) -> None:
    """Raise `LuthierError` for the first contradiction, at the option to change."""
    for rule in RULES:
        rule(recipe)


def _conflict(where: str, problem: str, remedy: str | None = None) -> LuthierError:
    return LuthierError("recipe-conflict", problem, where=where, remedy=remedy)


def _sources(recipe: Settings) -> None:
    if not recipe.model.name_or_path:
        raise LuthierError("recipe-missing", "is empty", where="model.name_or_path")
    lists = {"data.train": recipe.data.train, "data.validation": recipe.data.validation}
    for where, sources in lists.items():
        if not isinstance(sources, list):
            continue
        if not sources:
            raise LuthierError("recipe-missing", "names no source", where=where)
        for index, source in enumerate(sources):
            if not source.path:
                raise LuthierError("recipe-missing", "is empty", where=f"{where}.{index}.path")


def _validation(recipe: Settings) -> None:
    share = recipe.data.validation
    if isinstance(share, float) and not 0.0 <= share <= 0.5:
        remedy = "Give a share of the rows from 0 to 0.5, or a list of sources."
        raise LuthierError("recipe-out-of-range", "outside its bounds", where="data.validation", found=share,
                           remedy=remedy)  # fmt: skip


def _warmup(recipe: Settings) -> None:
    if recipe.warmup_steps and recipe.warmup_ratio:
        raise _conflict("warmup_ratio", f"warmup_steps is given too, as {recipe.warmup_steps}")


def _batch(recipe: Settings) -> None:
    product = batch_product(recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps)
    if product not in (None, recipe.global_batch_size):
        problem = f"per_device_train_batch_size x gradient_accumulation_steps is {product}"
        raise LuthierError("recipe-conflict", problem, where="global_batch_size", found=recipe.global_batch_size)


def batch_product(size: int | None, accumulation: int | None, ranks: int = 1) -> int | None:
    """Return the global batch size that the two options mean; None if neither is given."""
    if size is None and accumulation is None:
        return None
    if size is None:
        problem = "says nothing without per_device_train_batch_size"
        remedy = "Give both, or global_batch_size alone."
        raise LuthierError("recipe-missing", problem, where="gradient_accumulation_steps", remedy=remedy)
    return size * (accumulation or 1) * ranks


def _clipping(recipe: Settings) -> None:
    if recipe.max_grad_norm == 0:
        problem = "would clip every gradient to nothing"
        remedy = "Write none for no clipping."
        raise LuthierError("recipe-out-of-range", problem, where="max_grad_norm", found=0, remedy=remedy)


def _multipliers(recipe: Settings) -> None:
    for pattern, factor in recipe.lr_multipliers.items():
        if not 0.0 <= factor < float("inf"):
            raise LuthierError("recipe-out-of-range", "not a factor of a learning rate",
                               where=f"lr_multipliers.{pattern}", found=factor, remedy="Write 0 or more.")  # fmt: skip
        try:
            re.compile(pattern)
        except re.error as error:
            problem = f"not a regular expression: {error}"
            raise LuthierError("recipe-wrong-type", problem, where="lr_multipliers", found=pattern) from None


def _device(recipe: Settings) -> None:
    if not DEVICE.fullmatch(recipe.device):
        remedy = "Choose auto, cpu, cuda, cuda:N or mps."
        raise LuthierError("recipe-out-of-range", "no such device", where="device", found=recipe.device, remedy=remedy)


RULES: Final[tuple[Callable[[Settings], None], ...]] = (
    _sources,
    _validation,
    _warmup,
    check_mode,
    check_streaming,
    check_blocks,
    _batch,
    _clipping,
    _multipliers,
    _device,
    check_saving,
    check_other_models,
    check_unread,
)
