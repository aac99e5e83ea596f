"""`luthier init`: four questions, and a recipe that trains."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from luthier.cli.completion.commands import complete_method, complete_model
from luthier.cli.screen.answers import Answer, print_error
from luthier.cli.screen.early_checks import locate_model
from luthier.cli.screen.flags import Json
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.cli.recipe_verbs.first_recipe import Look
    from luthier.plugins.registry import Plugins

Settled = TypeVar("Settled")
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="The file that is written; it must not be there yet.")]
Model = Annotated[
    str | None, typer.Option(help="The model: a hub name, a folder, or demo.", autocompletion=complete_model)
]
Data = Annotated[str | None, typer.Option(help="The rows: a file, a glob, or a hub dataset.")]
Method = Annotated[
    str | None,
    typer.Option(help="The method: an adapter such as lora or full, or a loss such as dpo.",
                 autocompletion=complete_method),
]  # fmt: skip
Where = Annotated[str | None, typer.Option(help="Where it runs: here, a provider, or the GiB of memory of the device.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Take the default of every question that no flag answers.")]
FLAGS: Final = ("--model", "--data", "--method", "--where")


def init(
    recipe: Recipe = Path("recipe.yaml"),
    *,
    model: Model = None,
    data: Data = None,
    method: Method = None,
    where: Where = None,
    yes: Yes = False,
    json: Json = False,
) -> Any:
    """Ask four questions and write a recipe that trains."""
    from luthier.cli.recipe_verbs.first_recipe import SCHEMA, Answers, describe_memory, recipe_text
    from luthier.plugins.registry import installed_plugins

    _check_file(recipe)
    _check_answers(dict(zip(FLAGS, (model, data, method, where), strict=True)), yes=yes or json)
    plugins = installed_plugins()
    desk = Desk(silent=yes or json)
    answers, look, settings = desk.settle(Answers, (model, data, method, where), plugins)
    text = recipe_text(recipe, answers, look, settings)
    schema = recipe.parent / SCHEMA
    with recipe.open("x", encoding="utf-8") as file:
        file.write(text)
    if not schema.exists():
        _write_schema(schema)
    document = {"path": recipe, "schema": schema, "format": look.format if look else None, "settings": settings,
                "memory": describe_memory(answers, settings["adapter"]), "next": _next(recipe, settings)}  # fmt: skip
    return Answer(document=document, view=lambda screen: _draw(screen, text, document))


class Desk:
    """A dialogue that asks each question once, with its default, and again after an impossible answer."""

    def __init__(self, *, silent: bool) -> None:
        self.silent = silent

    def settle(
        self, made: Callable[..., Any], given: tuple[str | None, ...], plugins: Plugins
    ) -> tuple[Any, Look | None, dict[str, Any]]:
        """Return the answers, what the rows show, and the settings that follow."""
        from luthier.cli.recipe_verbs import first_recipe as recipes

        model, data, method, where = given
        _, model_name = self.ask("Model (a hub name, a folder, or demo)", model, "demo", locate_model)
        data, look = self.ask("Data (a file, a glob, or a hub dataset)", data, recipes.find_rows(),
                              recipes.look_at_rows)  # fmt: skip
        methods = recipes.list_methods(look.kind if look else "tokens", plugins)
        shown = ", ".join(methods[:8]) + (", ..." if len(methods) > 8 else "")
        method, parts = self.ask(f"What to do ({shown})", method, methods[0],
                                 lambda given: recipes.settle_method(given, look, plugins))  # fmt: skip
        place = "Where it runs (here, a provider, or the GiB of memory of the device)"
        where, settings = self.ask(place, where, "here", lambda given: recipes.settle_place(
            given, model_name, parts["adapter"], plugins))  # fmt: skip
        return made(model=model_name, data=data, method=method, where=where), look, {**parts, **settings}

    def ask(
        self, question: str, given: str | None, default: str, check: Callable[[str], Settled]
    ) -> tuple[str, Settled]:
        """Return an answer and what follows from it. A flag, or a default that was not asked about, must be right."""
        if given is not None or self.silent:
            answer = default if given is None else given
            return answer, check(answer)
        while True:
            answer = typer.prompt(question, default=default, err=True)
            try:
                return answer, check(answer)
            except LuthierError as error:
                print_error(error)


def _check_file(path: Path) -> None:
    if path.exists():
        remedy = "Name another, such as luthier init second.yaml."
        raise LuthierError("path-unwritable", "exists already, and is not replaced", where=str(path), remedy=remedy)
    if path.suffix not in (".yaml", ".yml"):
        raise LuthierError("usage", "the recipe is written as YAML", where=str(path), remedy="Name it *.yaml.")
    if not path.absolute().parent.is_dir():
        raise LuthierError("path-unwritable", "there is no such folder", where=str(path.parent))


def _check_answers(given: dict[str, str | None], *, yes: bool) -> None:
    """Refuse to ask where nobody can answer."""
    missing = [flag for flag, answer in given.items() if answer is None]
    if missing and not yes and not sys.stdin.isatty():
        remedy = f"Give {', '.join(missing)}, or --yes for the defaults."
        raise LuthierError("usage", "there is no terminal to ask questions in", remedy=remedy)


def _write_schema(path: Path) -> None:
    from luthier.cli.recipe_verbs.json_schema import write_schema
    from luthier.recipe.editor_schema.whole_recipe import make_schema
    from luthier.training.continual.tasks import TaskSequence

    write_schema(path, make_schema(sequence=TaskSequence))


def _next(recipe: Path, settings: dict[str, Any]) -> list[str]:
    """Return the commands to run next."""
    name, run = shlex.quote(str(recipe)), shlex.quote(str(recipe.parent / "runs" / recipe.stem))
    if "provider" in settings:
        return [f"luthier estimate {name}", f"luthier submit {name}", "luthier jobs"]
    return [f"luthier plan {name}", f"luthier train {name}", f"luthier chat {run}"]


def _draw(screen: Console, text: str, made: dict[str, Any]) -> None:
    from luthier.cli.screen.tables import draw_commands

    screen.print(f"{made['path']} is written:", style="bold", soft_wrap=True)
    screen.print(text, soft_wrap=True)
    if made["memory"]:
        screen.print(made["memory"], style="yellow", soft_wrap=True)
    draw_commands(screen, "Next", made["next"])
