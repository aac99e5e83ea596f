"""Commands that do not load what only the parsing of values needs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Final

from typer.core import TyperCommand, TyperGroup

GIVEN: Final = "luthier.given"  # where a context keeps the words of the command line
PARSED: Final = "luthier.parsed"  # the same, as soon as the parser knows every option


class QuickParsing:
    """What a command and a group have in common: an option that is not given keeps its default unparsed.

    To parse one value, even a default, typer 0.29 loads a library, for which a short command would take half as long
    again. A parser still knows every option, so that an unknown one is refused.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[GIVEN] = list(args)
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc]
        finally:
            ctx.meta.pop(PARSED, None)

    def make_parser(self, ctx: Any) -> Any:
        parser = super().make_parser(ctx)  # type: ignore[misc]
        ctx.meta[PARSED] = ctx.meta.pop(GIVEN, None)
        return parser

    def get_params(self, ctx: Any) -> list[Any]:
        every: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        words = ctx.meta.get(PARSED)
        if words is None or "--help" in words:
            return every
        return [param for param in every if _is_needed(param, words)]


class QuickCommand(QuickParsing, TyperCommand):
    """A command without a recipe, whose own options are all that it has."""


class QuickGroup(QuickParsing, TyperGroup):
    """A group, whose own options come before the name of the command."""

    def make_parser(self, ctx: Any) -> Any:
        parser = super().make_parser(ctx)
        words = ctx.meta.get(PARSED)
        ctx.meta[PARSED] = None if words is None else list(takewhile(lambda word: word.startswith("-"), words))
        return parser


def _is_needed(param: Any, words: Sequence[str]) -> bool:
    """Return True for an argument, and for an option that a word may mean, written out or in a group of letters."""
    if param.param_type_name == "argument" or param.required or param.envvar:
        return True
    names = (*param.opts, *param.secondary_opts)
    letters = [name[1] for name in names if len(name) == 2]
    return any(
        word.startswith(names) or (word[:1] == "-" and word[:2] != "--" and any(x in word for x in letters))
        for word in words
    )
