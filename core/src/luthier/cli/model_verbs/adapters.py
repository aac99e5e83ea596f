"""`luthier combine`, `unmerge` and `push`: what can be done with trained adapters besides merging them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from luthier.cli.completion.commands import complete_model
from luthier.cli.screen.answers import Answer
from luthier.cli.screen.early_checks import locate_model
from luthier.cli.screen.flags import Json, LogFile, LogFormat, LogLevel, start_api
from luthier.sizes import size_text

Adapters = Annotated[
    list[Path],
    typer.Argument(
        help="Runs (folder, name or id), or adapters' folders: two or more of one base.", autocompletion=complete_model
    ),
]
Method = Annotated[
    Literal["linear", "ties", "dare_linear", "dare_ties", "cat", "slao"],
    typer.Option(help="How they are combined; cat adds the updates themselves, slao merges them in order."),
]
Weights = Annotated[
    list[float] | None, typer.Option("--weight", help="The weight of each adapter, in their order; repeat it.")
]
Density = Annotated[float | None, typer.Option(help="The share of numbers that TIES and DARE keep.")]
Seed = Annotated[int | None, typer.Option(help="Decides which numbers DARE keeps.", min=0)]
NewFolder = Annotated[Path, typer.Option(help="The new folder.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; without it, as the merged model.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list the files that would be sent, without any request.")]


def combine(
    paths: Adapters, *, output_dir: NewFolder, method: Method = "linear", weight: Weights = None,
    density: Density = None, seed: Seed = None, json: Json = False, log_level: LogLevel = "info",
    log_format: LogFormat = "console", log_file: LogFile = None,
) -> Any:  # fmt: skip
    """Make one adapter of several of the same base."""
    paths = [Path(locate_model(str(path))) for path in paths]
    start_api(log_level, log_format, log_file)
    from luthier import artifact_api

    made = artifact_api.combine(paths, output_dir, method=method, weights=weight, density=density, seed=seed)
    return Answer(document={"adapter": made, "method": method},
                  view=lambda screen: screen.out(f"adapter: {made}", highlight=False))  # fmt: skip


def unmerge(
    merged: Annotated[Path, typer.Argument(help="The merged model: its folder, or that of the run that made it.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter that was merged: its run's folder, or its own.")],
    *,
    output_dir: NewFolder,
    save_dtype: Dtype = None,
    json: Json = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = "console",
    log_file: LogFile = None,
) -> Any:
    """Take an adapter out of the model that it was merged into."""
    from luthier.recipe.artifact_note import read_note

    merged, adapter = (Path(locate_model(str(path))) for path in (merged, adapter))
    start_api(log_level, log_format, log_file)
    from luthier import artifact_api

    base = artifact_api.unmerge(merged, adapter, output_dir, save_dtype=save_dtype)
    exact = read_note(base).get("unmerge", {}).get("bit_exact", False)
    said = f"base: {base} ({'bit for bit' if exact else 'to the rounding of the merged files'})"
    return Answer(document={"base": base, "bit_exact": exact}, view=lambda screen: screen.out(said, highlight=False))


def push(
    path: Annotated[
        Path, typer.Argument(help="A run (folder, name or id), or an artifact's folder.", autocompletion=complete_model)
    ],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub.")],
    *,
    public: Annotated[bool, typer.Option("--public", help="A new repository is public; else it is private.")] = False,
    revision: Annotated[str, typer.Option(help="The branch.")] = "main",
    message: Annotated[str | None, typer.Option(help="The message of the commit.")] = None,
    dry_run: DryRun = False,
    json: Json = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = "console",
    log_file: LogFile = None,
) -> Any:
    """Send an artifact to a repository of the Hugging Face hub."""
    import attrs

    path = Path(locate_model(str(path)))
    start_api(log_level, log_format, log_file)
    from luthier import artifact_api

    sent = artifact_api.push(path, repository, private=not public, revision=revision, message=message, dry_run=dry_run)
    lines = [f"{name}  {size_text(size)}" for name, size in sent.files.items()]
    end = f"pushed: {sent.url}" if sent.url else f"would push {len(lines)} files to {repository}, branch {revision}"
    return Answer(document={**attrs.asdict(sent), "dry_run": dry_run},
                  view=lambda screen: screen.out("\n".join([*lines, end]), highlight=False))  # fmt: skip
