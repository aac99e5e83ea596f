"""`luthier new-plugin`: the beginning of a plugin, complete and tested."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.completion.commands import complete_kind
from luthier.cli.screen.answers import Answer
from luthier.cli.screen.flags import Json

if TYPE_CHECKING:
    from rich.console import Console


def new_plugin(
    name: Annotated[str, typer.Argument(help="The part's name; the distribution is luthier-NAME.")],
    *,
    kind: Annotated[
        str,
        typer.Option(
            help="The kind of part: adapter, loss, optimizer, quantizer, callback, ...", autocompletion=complete_kind
        ),
    ],
    data: Annotated[str, typer.Option(help="The rows of a loss: tokens or preference.")] = "tokens",
    folder: Annotated[Path, typer.Option(help="Where the package's folder is made.")] = Path(),
    json: Json = False,
) -> Any:
    """Make a plugin that installs and passes its own tests."""
    from luthier.scaffold import make_package

    path = make_package(name, kind, folder, data)
    steps = [
        f"pip install -e {shlex.quote(str(path))}",
        f"luthier plugins show {kind} {name}",
        f"pytest {shlex.quote(str(path))}",
    ]
    document = {
        "path": path,
        "files": sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()),
        "next": steps,
    }
    return Answer(document=document, view=lambda screen: _draw(screen, document))


def _draw(screen: Console, made: dict[str, Any]) -> None:
    from luthier.cli.screen.tables import draw_commands, draw_section

    draw_section(screen, str(made["path"]), "\n".join(made["files"]))
    draw_commands(screen, "Next", made["next"])
