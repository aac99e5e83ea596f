"""The settled recipe: the recipe that a run follows, with a number for every `auto`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import attrs

from luthier.recipe.recipe import Recipe

NUMBERS: Final = ("learning_rate", "global_batch_size", "max_tokens_per_device")


@attrs.frozen(kw_only=True, eq=False)
class SettledRecipe(Recipe):
    """A recipe whose numbers are all decided, and which packs documents only if its model allows that."""

    learning_rate: float
    global_batch_size: int
    max_tokens_per_device: int

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        assert all(getattr(self, name) != "auto" for name in NUMBERS), "every number is decided"


def settle_recipe(recipe: Recipe, numbers: Mapping[str, float], *, packing: bool) -> SettledRecipe:
    """Return the recipe with `numbers` for the settings that it leaves to `auto`; its own values stay."""
    settings = {field.alias: getattr(recipe, field.name) for field in attrs.fields(type(recipe))}
    settings |= {name: value for name, value in numbers.items() if settings[name] == "auto"}
    settings["packing"] = packing
    return SettledRecipe(**settings)
