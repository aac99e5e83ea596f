"""`luthier schema`: the JSON schema of recipes, for editors, or of a verb's output with `--json`."""

from __future__ import annotations

from collections.abc import Callable
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
    of: Annotated[str | None, typer.Option(help="Of this verb's output with --json, such as `runs show`.")] = None,
    json: Json = False,
) -> Any:
    """Print the JSON schema of recipes, with every part's options."""
    if of is not None:
        return _answer_document(of, output)
    from luthier.recipe.editor_schema.whole_recipe import make_schema
    from luthier.training.continual.tasks import TaskSequence

    document = make_schema(sequence=TaskSequence, complete=complete)
    return _answer_schema(document, output, _draw)


def _answer_document(verb: str, output: Path | None) -> Answer:
    """Answer with the schema of a verb's output."""
    from luthier.cli.documents.document_schemas import document_schema

    document = document_schema(verb)
    return _answer_schema(document, output, lambda screen, path: screen.print(f"{path} is written.", soft_wrap=True))


def _answer_schema(document: dict[str, Any], output: Path | None, draw: Callable[[Console, Path], None]) -> Answer:
    """Answer with a schema, or write it to the output file."""
    if output is None:
        return Answer(document=document, view=lambda screen: print_json(document, screen.file))
    write_schema(output, document)
    return Answer(document={"path": output}, view=lambda screen: draw(screen, output))


def write_schema(path: Path, document: dict[str, Any]) -> None:
    """Write a schema, replacing an older one. A missing folder is an error."""
    from luthier.disk import write_json
    from luthier.errors import LuthierError

    if not path.absolute().parent.is_dir():
        raise LuthierError("path-unwritable", "there is no such folder", where=str(path.parent))
    write_json(path, document)


def _draw(screen: Console, path: Path) -> None:
    screen.print(f"{path} is written. A recipe beside it begins with:", soft_wrap=True)
    screen.print(f"  # yaml-language-server: $schema={path.name}", soft_wrap=True)
