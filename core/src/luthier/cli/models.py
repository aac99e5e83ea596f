"""`luthier generate`, `merge` and `export`: what can be done with a trained model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from luthier.cli.completion.commands import complete_exporter, complete_model
from luthier.cli.screen.answers import Answer
from luthier.cli.screen.chat.answer_views import write_piece
from luthier.cli.screen.chat.piped_text import read_piped_text
from luthier.cli.screen.early_checks import check_exporter, locate_model
from luthier.cli.screen.flags import Best, Json, LogFile, LogFormat, LogLevel, Step, start_api
from luthier.cli.screen.tables import draw_serving
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.artifacts.serving import Serving

AnyModel = Annotated[
    str,
    typer.Argument(
        help="A run (folder, name or id), a checkpoint's folder, an adapter's, a model's, or a hub name.",
        autocompletion=complete_model,
    ),
]
Exported = Annotated[
    Path,
    typer.Argument(
        help="A run (folder, name or id), a checkpoint's folder, an adapter's, or a model's.",
        autocompletion=complete_model,
    ),
]
ExportFolder = Annotated[
    Path | None, typer.Option(help="The new folder; without it, one beside the artifact, named after the format.")
]
ExporterOption = Annotated[
    list[str] | None, typer.Option("--option", help="NAME=VALUE, an option of the exporter; may be repeated.")
]
Format = Annotated[
    str,
    typer.Option(
        "--format", help="The exporter's name; `luthier plugins` lists them.", autocompletion=complete_exporter
    ),
]
Base = Annotated[str | None, typer.Option(help="The base model, if it is not where the adapter says.")]

Adapted = Annotated[
    Path,
    typer.Argument(
        help="A run (folder, name or id), a checkpoint's folder, or an adapter's.", autocompletion=complete_model
    ),
]
MergedDir = Annotated[Path | None, typer.Option(help="The merged model's folder; without it, `merged` in PATH.")]
SaveDtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; without it, as the run's recipe says.")
]
ShardSize = Annotated[str | None, typer.Option(help="The largest file, such as 5GB.")]
Onto = Annotated[
    Literal["dequantized", "original"],
    typer.Option(help="The weight that a quantized layer's update is added to: its own, or the checkpoint's."),
]


def generate(
    model: AnyModel,
    prompt: Annotated[str | None, typer.Argument(help="The question; without it, standard input.")] = None,
    *,
    base: Base = None,
    system: Annotated[str | None, typer.Option(help="A system message before the prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the answer, at most.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability.", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="The seed of sampling.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    step: Step = None,
    best: Best = False,
    json: Json = False,
    log_level: LogLevel = "warning",
    log_format: LogFormat = "console",
    log_file: LogFile = None,
) -> Any:
    """Answer a prompt with a model, an adapter or a run."""
    model = locate_model(model)
    asked = _prompt(prompt)
    api = start_api(log_level, log_format, log_file)
    streams = sys.stdout.isatty() and not json
    text = api.generate(model, asked, base=base, system=system, device=device, max_new_tokens=max_new_tokens,
                        temperature=temperature, top_p=top_p, seed=seed, step=step, best=best,
                        on_text=write_piece if streams else None)  # fmt: skip
    document = {"model": model, "base": base, "prompt": asked, "text": text}
    return Answer(document=document, view=lambda screen: screen.out("" if streams else text, highlight=False))


def merge(
    path: Adapted, output_dir: MergedDir = None, *, base: Base = None, save_dtype: SaveDtype = None,
    max_shard_size: ShardSize = None, onto: Onto = "dequantized", step: Step = None, best: Best = False,
    json: Json = False, log_level: LogLevel = "info", log_format: LogFormat = "console", log_file: LogFile = None,
) -> Any:  # fmt: skip
    """Merge an adapter into its base model, verified by reloading."""
    from luthier.recipe.artifact_note import read_note

    path = Path(locate_model(str(path)))
    api = start_api(log_level, log_format, log_file)
    merged = api.merge(path, output_dir, base=base, save_dtype=save_dtype, max_shard_size=max_shard_size, onto=onto,
                       step=step, best=best)  # fmt: skip
    merge_note = read_note(merged)["merge"]
    said, serving = "\n".join([f"merged: {merged}", *_describe_merge(merge_note)]), _find_serving(merged)
    document = {"merged": merged, **merge_note, "serve": serving.to_dict()}
    return Answer(document=document, view=lambda screen: _draw_made(screen, said, serving))


def _find_serving(folder: Path) -> Serving:
    from luthier.artifacts.serving import find_serving

    return find_serving(folder)


def _draw_made(screen: Console, said: str, serving: Serving | None) -> None:
    """Print what was made, and how it can be served."""
    screen.out(said, highlight=False)
    if serving is not None:
        draw_serving(screen, serving)


def _describe_merge(note: Mapping[str, Any]) -> list[str]:
    """Return the measurements of a merge as lines of text."""
    lines = [f"error onto {name} weights: {error:.2g} of the outputs" for name, error in note["errors"].items()]
    share = note["kept"]
    return lines if share is None else [*lines, f"remaining update in {note['dtype']}: {min(share, 1.0):.1%}"]


def export(
    path: Exported,
    *,
    format_: Format,
    output_dir: ExportFolder = None,
    option: ExporterOption = None,
    base: Base = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check what can be checked, and write nothing.")] = False,
    step: Step = None,
    best: Best = False,
    json: Json = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = "console",
    log_file: LogFile = None,
) -> Any:
    """Write a trained model in another tool's format, and compare."""
    path = Path(locate_model(str(path)))
    chosen = {"name": format_, **_exporter_options(option or ())}
    check_exporter(chosen)
    api = start_api(log_level, log_format, log_file)
    exported = api.export(path, chosen, output_dir, base=base, dry_run=dry_run, step=step, best=best)
    document = {"folder": exported.folder, "format": exported.format, "distribution": exported.distribution,
                "files": exported.files, "differences": exported.differences, "dry_run": dry_run}  # fmt: skip
    said = f"{'would write' if dry_run else 'wrote'} {exported.format}: {exported.folder}"
    differing = "".join(f"\n{name}: {value:.3g}" for name, value in exported.differences.items())
    serving = None if dry_run else _find_serving(exported.folder)
    document["serve"] = serving.to_dict() if serving else None
    return Answer(document=document, view=lambda screen: _draw_made(screen, said + differing, serving))


def _exporter_options(given: Iterable[str]) -> dict[str, Any]:
    from luthier.recipe.reading.overrides import parse_value

    pairs = [text.partition("=") for text in given]
    for name, equals, _ in pairs:
        if not equals:
            raise LuthierError("usage", "expected NAME=VALUE", where="--option", found=name)
    return {name: parse_value(value) for name, _, value in pairs}


def _prompt(given: str | None) -> str:
    if given is not None:
        return given
    if sys.stdin.isatty():
        raise LuthierError("usage", "the prompt is missing", remedy="Write it after the model, or pipe it in.")
    return read_piped_text().removesuffix("\n").removesuffix("\r")
