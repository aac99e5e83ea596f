"""Completion as typer calls it: a class of commands that take recipes, and functions for single parameters."""

from __future__ import annotations

import os
from typing import Any

import attrs
import typer
from typer.core import TyperCommand


@attrs.frozen(kw_only=True)
class Word:
    """A word that is offered, as the shells' formatters read it; typer's own class lies in another place by version."""

    value: str
    help: str
    type: str = "plain"


class RecipeCommand(TyperCommand):
    """A command that takes a recipe and its flags, which typer does not know."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """While a word is completed, leave the words as they are: typer's reading of values loads a library."""
        if not ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        ctx.args = list(args)
        return ctx.args

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """The command's own options, then what a recipe may say."""
        from luthier.cli.completion.offers import offer_recipe_words

        own = super().shell_complete(ctx, incomplete) if incomplete.startswith("-") else []
        offered = offer_recipe_words(ctx.args, _whole_word() or incomplete)
        return [*own, *(Word(value=word, help=told) for word, told in offered)]


def _whole_word() -> str | None:
    """The word `--flag=value` as zsh and fish have it: click gives only the value, and drops the flag."""
    word = os.environ.get("_TYPER_COMPLETE_ARGS", "").rpartition(" ")[2]
    return word if word.startswith("--") and "=" in word else None


def complete_setting(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """A dotted name for `--set`, or its value."""
    from luthier.cli.completion.offers import offer_settings

    return offer_settings(ctx.args, incomplete)


def complete_model(incomplete: str) -> list[str]:
    """A run's folder, or the embedded model."""
    from luthier.cli.completion.offers import offer_runs

    return [*offer_runs(incomplete, as_paths=True), *(["demo"] if "demo".startswith(incomplete) else [])]


def complete_run(incomplete: str) -> list[str]:
    """The name of a run."""
    from luthier.cli.completion.offers import offer_runs

    return offer_runs(incomplete, as_paths=False) or offer_runs(incomplete, as_paths=True)


def complete_kind(incomplete: str) -> list[str]:
    """A kind of parts."""
    from luthier.cli.completion.offers import offer_kinds

    return offer_kinds(incomplete)


def complete_part_name(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """A part of the kind that stands before it."""
    from luthier.cli.completion.offers import offer_parts

    return offer_parts(str(ctx.params.get("kind")), incomplete)


def complete_provider(incomplete: str) -> list[tuple[str, str]]:
    """An installed provider."""
    from luthier.cli.completion.offers import offer_parts

    return offer_parts("provider", incomplete)


def complete_exporter(incomplete: str) -> list[tuple[str, str]]:
    """An installed exporter."""
    from luthier.cli.completion.offers import offer_parts

    return offer_parts("exporter", incomplete)


def complete_method(incomplete: str) -> list[tuple[str, str]]:
    """An installed adapter or loss."""
    from luthier.cli.completion.offers import offer_methods

    return offer_methods(incomplete)
