"""`luthier schema`: what editors need to complete and check recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.screen.answers import Answer, print_json
from luthier.cli.screen.flags import Json

if TYPE_CHECKING:
    from rich.console import Console


def schema(
    output: Annotated[Path | None, typer.Option(help="Write the schema to this file.")] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Import libraries too, for options that only they know, such as peft's.")
    ] = False,
    json: Json = False,
) -> Any:
    """Print the JSON schema of recipes, with the options of every installed part."""
    from luthier.recipe.editor_schema.whole_recipe import make_schema
    from luthier.training.continual.tasks import TaskSequence

    document = make_schema(sequence=TaskSequence, complete=complete)
    if output is None:
        return Answer(document=document, view=lambda screen: print_json(document, screen.file))
    write_schema(output, document)
    return Answer(document={"path": output}, view=lambda screen: _draw(screen, output))


def write_schema(path: Path, document: dict[str, Any]) -> None:
    """Write a schema in the place of an older one; a folder that is not there is an error."""
    from luthier.disk import write_json
    from luthier.errors import LuthierError

    if not path.absolute().parent.is_dir():
        raise LuthierError("path-unwritable", "there is no such folder", where=str(path.parent))
    write_json(path, document)


def _draw(screen: Console, path: Path) -> None:
    screen.print(f"{path} is written. A recipe beside it begins with:", soft_wrap=True)
    screen.print(f"  # yaml-language-server: $schema={path.name}", soft_wrap=True)
