"""The recipe of one run: its settings, checked together, read from several forms and written as YAML."""

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

    `from_dict` and `load` put options objects into the part fields. Recipes are equal if they name the same parts
    with the same options, however they write them.
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
        """Return a recipe from plain data, in which short forms and other tools' names are allowed.

        Relative paths are joined to the folder `base`; None leaves them unchanged, relative to the working directory.
        `plugins` None means the installed ones. Raises `LuthierError` with the option's dotted path.
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
        """Return a recipe from a YAML, TOML or JSON file, overridden by `LUTHIER_*` variables, then by `overrides`.

        `overrides` maps dotted paths to values, or lists texts `a.b=c` and results of `parse_flags`. `environ` None
        means the process's own environment. Raises `LuthierError` with the place of each error.
        """
        return load_recipe(path, overrides, environ=environ, plugins=plugins).recipe

    def to_dict(self, plugins: Plugins | None = None) -> dict[str, Any]:
        """Return the resolved recipe as plain data with every default; `from_dict` makes an equal recipe of it."""
        return plain_recipe(self, plugins)

    def write(self, path: str | Path, plugins: Plugins | None = None) -> None:
        """Write the resolved recipe as YAML with absolute paths, so that it means the same wherever the file lies."""
        write_recipe(self, path, plugins)


def from_mapping(
    mapping: Mapping[str, Any], *, base: str | Path | None = None, plugins: Plugins | None = None
) -> Reading[Recipe]:
    """Return a recipe from plain data, with its notes. The environment is read for `${NAME}` only."""
    return read_mapping(Recipe, mapping, base=base, plugins=plugins)


def load_recipe(
    source: str | Path | Mapping[str, Any] | Settings | None = None,
    overrides: Mapping[str, Any] | Iterable[Override | str] = (),
    *,
    base: Path | None = None,
    environ: Mapping[str, str] | None = None,
    plugins: Plugins | None = None,
) -> Reading[Recipe]:
    """Return a recipe from a source, overridden by `LUTHIER_*` variables (for a file), then by `overrides`.

    `source` is a file, plain data, or another recipe; variables do not override the last two. `overrides` maps dotted
    paths to values, or lists texts `a.b=c` and results of `parse_flags`. Relative paths in overrides and variables are
    relative to the working directory, and those in plain data to `base`, if it is given. `environ` None means the
    process's own environment.
    """
    return read_settings(Recipe, source, overrides, base=base, environ=environ, plugins=plugins)
