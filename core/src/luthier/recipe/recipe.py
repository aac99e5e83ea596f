"""The recipe of one run: its settings, checked together, read from anything and written as YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from luthier.plugins.registry import Plugins
from luthier.recipe.checks.contradictions import check_contradictions
from luthier.recipe.reading.overrides import Override
from luthier.recipe.reading.read_recipe import Reading, read_mapping, read_settings
from luthier.recipe.schema import Settings
from luthier.recipe.writing import plain_recipe, same_run, write_recipe


@attrs.frozen(kw_only=True, eq=False)
class Recipe(Settings):
    """One run. Part fields hold a name, a mapping `{name: ..., options}`, an options object, or a part itself.

    `from_dict` and `load` leave options objects in the part fields. Recipes are equal when they name the same parts
    with the same options, however those are written.
    """

    def __attrs_post_init__(self) -> None:
        check_contradictions(self)

    def __eq__(self, other: object) -> bool:
        return same_run(self, other) if isinstance(other, Recipe) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_dict(
        cls, mapping: Mapping[str, Any], base: str | Path | None = None, *, plugins: Plugins | None = None
    ) -> Recipe:
        """A recipe from plain data, shorthand and other tools' names included.

        Relative paths are joined to the folder `base`; None leaves them as they are, relative to the working
        directory. `plugins` None: the installed ones. Raises `LuthierError` with the option's dotted path.
        """
        return from_mapping(mapping, base=base, plugins=plugins).recipe

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Mapping[str, Any] | Iterable[Any] = (),
        *,
        environ: Mapping[str, str] | None = None,
        plugins: Plugins | None = None,
    ) -> Recipe:
        """A recipe from a YAML, TOML or JSON file, then `LUTHIER_*` of the environment, then the overrides.

        `overrides` maps dotted paths to values, or lists `a.b=c` and what `parse_flags` gives. `environ` None: the
        process's own.
        """
        return load_recipe(path, overrides, environ=environ, plugins=plugins).recipe

    def to_dict(self, plugins: Plugins | None = None) -> dict[str, Any]:
        """The resolved recipe as plain data, every default included; `from_dict` gives an equal recipe back."""
        return plain_recipe(self, plugins)

    def write(self, path: str | Path, plugins: Plugins | None = None) -> None:
        """Write the resolved recipe as YAML, its paths absolute, so that it means the same wherever it lies."""
        write_recipe(self, path, plugins)


def from_mapping(
    mapping: Mapping[str, Any], *, base: str | Path | None = None, plugins: Plugins | None = None
) -> Reading[Recipe]:
    """A recipe from plain data; the environment is read for `${NAME}` only."""
    return read_mapping(Recipe, mapping, base=base, plugins=plugins)


def load_recipe(
    source: str | Path | Mapping[str, Any] | Settings | None = None,
    overrides: Mapping[str, Any] | Iterable[Override | str] = (),
    *,
    environ: Mapping[str, str] | None = None,
    plugins: Plugins | None = None,
) -> Reading[Recipe]:
    """A recipe from a source, with the environment's `LUTHIER_*` over a file's values, and the overrides over both.

    `source` is a file, plain data, or another recipe; over the last two the environment has no say. `overrides` maps
    dotted paths to values, or lists texts `a.b=c` and what `parse_flags` gives; relative paths in it, and in the
    environment, are relative to the working directory. `environ` None: the process's own.
    """
    return read_settings(Recipe, source, overrides, environ=environ, plugins=plugins)
