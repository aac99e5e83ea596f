"""Training modes: what ends a run, which limits contradict it, and what streamed rows do not allow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal

from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.recipe.schema import Settings

Mode = Literal["epoch", "step", "token", "limits", "infinite"]
LIMITS: Final = {"epoch": "num_train_epochs", "step": "max_steps", "token": "max_tokens"}


def mode_of(recipe: Settings) -> Mode:
    """Return what ends the run: passes over the rows, steps, tokens, the first of two limits, or only a request."""
    if recipe.training_mode != "auto":
        return recipe.training_mode
    if recipe.max_steps and recipe.max_tokens:
        return "limits"
    if recipe.max_steps or recipe.max_tokens:
        return "step" if recipe.max_steps else "token"
    return "infinite" if math.isinf(recipe.num_train_epochs) else "epoch"


def check_mode(recipe: Settings) -> None:
    """Raise `recipe-missing` if a mode lacks its own limit, and `recipe-conflict` if another mode's limit is given."""
    mode, epochs = recipe.training_mode, recipe.num_train_epochs
    if mode_of(recipe) == "epoch" and not (0 < epochs < math.inf):
        problem = "endless" if epochs else "no epochs, and neither max_steps nor max_tokens"
        raise LuthierError("recipe-out-of-range", problem, where="num_train_epochs", found=epochs)
    if mode == "auto":
        return
    own = LIMITS.get(mode)
    if own is not None and not getattr(recipe, own):
        raise LuthierError("recipe-missing", f"training_mode {mode} needs it to end", where=own)
    given = [name for name in ("max_steps", "max_tokens") if getattr(recipe, name)]
    if mode != "epoch" and epochs != 1.0 and not (mode == "infinite" and math.isinf(epochs)):
        given.append("num_train_epochs")
    for name in given:
        if name != own:
            remedy = f"Leave it out, or set training_mode: {_mode_with(name)}."
            problem = f"training_mode {mode} does not read it"
            raise LuthierError("recipe-conflict", problem, where=name, remedy=remedy)


def _mode_with(limit: str) -> str:
    return next(mode for mode, name in LIMITS.items() if name == limit)


def check_streaming(recipe: Settings) -> None:
    """Raise `recipe-conflict` for options that need the number of rows, which a stream does not know."""
    if not recipe.data.streaming:
        return
    share, epochs = recipe.data.validation, recipe.num_train_epochs
    if isinstance(share, float) and share:
        problem, remedy = "a stream has no share to hold back", "Give validation its own file."
        raise LuthierError("recipe-conflict", problem, where="data.validation", found=share, remedy=remedy)
    if mode_of(recipe) == "epoch" and not epochs.is_integer():
        problem, remedy = "the number of rows in a stream is not known", "Set max_steps."
        raise LuthierError("recipe-conflict", problem, where="num_train_epochs", found=epochs, remedy=remedy)


def check_blocks(recipe: Settings) -> None:
    """Raise `recipe-conflict` if a block would not fit into a micro-batch."""
    size, most = recipe.data.block_size, recipe.max_tokens_per_device
    if size is not None and most != "auto" and size > most:
        problem = f"a block is larger than a micro-batch, which has {most} tokens"
        remedy = f"Raise max_tokens_per_device to {size}."
        raise LuthierError("recipe-conflict", problem, where="data.block_size", found=size, remedy=remedy)
