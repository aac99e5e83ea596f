"""The application: its verbs in the order of help, and the one place where every command ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Annotated, Any

import typer

import luthier
from luthier.cli import (
    checkpoint,
    continual,
    demo,
    doctor,
    inspect,
    models,
    plan,
    plugins,
    presets,
    runs,
    scaffold,
    train,
)
from luthier.cli.completion.commands import RecipeCommand
from luthier.cli.completion.quick_command import QuickCommand, QuickGroup
from luthier.cli.job_verbs import jobs, providers, submit
from luthier.cli.model_verbs import adapters, chat, evaluation
from luthier.cli.recipe_verbs import init, json_schema
from luthier.cli.screen import answers
from luthier.cli.screen.recipe_arguments import FREE
from luthier.errors import LuthierError


class Verbs(QuickGroup):
    """A group whose commands return an `Answer` or raise; both become output and an exit status here."""

    def main(  # type: ignore[override]  # what else typer passes is passed on
        self, args: Any = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        given = _with_dashes(sys.argv[1:] if args is None else args) or ["--help"]
        flags = given[: given.index("--")] if "--" in given else given
        as_json = "--json" in flags and "--help" not in flags
        extra |= {"standalone_mode": False, "obj": given}  # code that starts processes passes these words on
        in_lines = "--log-format=json" in flags or ("--log-format", "json") in pairwise(flags)
        sys.exit(
            answers.conclude_command(
                lambda: super(Verbs, self).main(given, prog_name, **extra), as_json=as_json, in_lines=in_lines
            )
        )

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the group's own flags; none while a word after a verb is completed, as reading them is slow."""
        return [] if ctx.resilient_parsing and ctx.args else super().get_params(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)  # the group's parser fills it again
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would turn it into a bare status
            raise LuthierError("interrupted", "stopped by Ctrl-C") from None


app = typer.Typer(
    cls=Verbs,
    name="luthier",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _with_dashes(words: Iterable[str]) -> list[str]:
    """Return the words with `--log_level` as `--log-level`. Names after a dot, and words after `--`, stay unchanged."""
    given, spelled = list(words), []
    end = given.index("--") if "--" in given else len(given)
    for word in given[:end]:
        name, equals, value = word.partition("=")
        spelled.append(name.replace("_", "-") + equals + value if name[:2] == "--" and "." not in name else word)
    return spelled + given[end:]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(luthier.__version__)
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]


@app.callback()
def root(version: Version = False) -> None:
    """Fine-tune language models out of interchangeable parts."""


app.command()(demo.demo)
app.command()(init.init)
verb: Callable[..., Any]
for verb in (train.train, continual.continual, plan.plan, inspect.inspect):
    app.command(cls=RecipeCommand, context_settings=FREE, add_help_option=False)(verb)
app.command()(models.generate)
app.command()(chat.chat)
app.command()(evaluation.evaluate)
app.command()(models.merge)
app.command()(models.export)
for verb in (adapters.combine, adapters.unmerge, adapters.push):
    app.command()(verb)
app.add_typer(runs.app, name="runs")
app.command()(checkpoint.checkpoint)
app.command()(presets.presets)
for verb in (submit.submit, submit.estimate):
    app.command(cls=RecipeCommand, context_settings=FREE, add_help_option=False)(verb)
for verb in (jobs.jobs, jobs.status, jobs.logs, jobs.cancel, jobs.download, jobs.attach):
    app.command(cls=QuickCommand)(verb)
app.add_typer(providers.app, name="providers")
app.add_typer(plugins.app, name="plugins")
app.command()(doctor.doctor)
app.command()(json_schema.schema)
app.command()(scaffold.new_plugin)
