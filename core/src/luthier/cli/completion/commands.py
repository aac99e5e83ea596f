"""Completion as typer calls it: a class of commands that take recipes, and functions for single parameters."""

from __future__ import annotations

import os
from typing import Any

import attrs
import typer
from typer.core import TyperCommand


@attrs.frozen(kw_only=True)
class Word:
    """A word that is offered, with the members that shells' formatters read; typer's own class moves with versions."""

    value: str
    help: str
    type: str = "plain"


class RecipeCommand(TyperCommand):
    """A command that takes a recipe and its flags, which typer itself does not know."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Leave the words unparsed while a word is completed, because typer's parsing of values loads a library."""
        if not ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        ctx.args = list(args)
        return ctx.args

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Return the command's own options, then what a recipe may contain."""
        from luthier.cli.completion.offers import offer_recipe_words

        own = super().shell_complete(ctx, incomplete) if incomplete.startswith("-") else []
        offered = offer_recipe_words(ctx.args, _whole_word() or incomplete)
        return [*own, *(Word(value=word, help=meaning) for word, meaning in offered)]


def _whole_word() -> str | None:
    """Return the word `--flag=value` from zsh and fish, of which click passes only the value; None otherwise."""
    word = os.environ.get("_TYPER_COMPLETE_ARGS", "").rpartition(" ")[2]
    return word if word.startswith("--") and "=" in word else None


def complete_setting(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return dotted names for `--set`, or values."""
    from luthier.cli.completion.offers import offer_settings

    return offer_settings(ctx.args, incomplete)


def complete_model(incomplete: str) -> list[str]:
    """Return runs' folders, and the embedded model."""
    from luthier.cli.completion.offers import offer_runs

    return [*offer_runs(incomplete, as_paths=True), *(["demo"] if "demo".startswith(incomplete) else [])]


def complete_run(incomplete: str) -> list[str]:
    """Return the names of runs."""
    from luthier.cli.completion.offers import offer_runs

    return offer_runs(incomplete, as_paths=False) or offer_runs(incomplete, as_paths=True)


def complete_kind(incomplete: str) -> list[str]:
    """Return the kinds of parts."""
    from luthier.cli.completion.offers import offer_kinds

    return offer_kinds(incomplete)


def complete_part_name(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the parts of the kind that the word before names."""
    from luthier.cli.completion.offers import offer_parts

    return offer_parts(str(ctx.params.get("kind")), incomplete)


def complete_provider(incomplete: str) -> list[tuple[str, str]]:
    """Return the installed providers."""
    from luthier.cli.completion.offers import offer_parts

    return offer_parts("provider", incomplete)


def complete_exporter(incomplete: str) -> list[tuple[str, str]]:
    """Return the installed exporters."""
    from luthier.cli.completion.offers import offer_parts

    return offer_parts("exporter", incomplete)


def complete_method(incomplete: str) -> list[tuple[str, str]]:
    """Return the installed adapters and losses."""
    from luthier.cli.completion.offers import offer_methods

    return offer_methods(incomplete)
