"""`luthier generate` and `luthier merge`: what one does with a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.answers import Answer
from luthier.cli.flags import Json, LogFile, LogFormat, LogLevel, started
from luthier.errors import LuthierError

Base = Annotated[str | None, typer.Option(help="The base model, where it is not where the adapter says.")]


def generate(
    model: Annotated[str, typer.Argument(help="A run's folder, an adapter's, a model's, or a hub name.")],
    prompt: Annotated[str | None, typer.Argument(help="The question; without it, standard input.")] = None,
    *,
    base: Base = None,
    system: Annotated[str | None, typer.Option(help="A system message before the prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the answer, at most.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability.", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="The seed of sampling.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    json: Json = False,
    log_level: LogLevel = "warning",
    log_format: LogFormat = "console",
    log_file: LogFile = None,
) -> Any:
    """Answer a prompt with a model, an adapter or a run."""
    asked = _prompt(prompt)
    api = started(log_level, log_format, log_file)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    text = api.generate(model, asked, base=base, system=system, device=device, **sampling)
    document = {"model": model, "base": base, "prompt": asked, "text": text}
    return Answer(document=document, view=lambda screen: screen.out(text, highlight=False))


def merge(
    path: Annotated[Path, typer.Argument(help="A run's folder, or an adapter's.")],
    output_dir: Annotated[
        Path | None, typer.Option(help="The merged model's folder; without it, `merged` in PATH.")
    ] = None,
    *,
    base: Base = None,
    save_dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; without it, as the run's recipe says.")
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="The largest file, such as 5GB.")] = None,
    json: Json = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = "console",
    log_file: LogFile = None,
) -> Any:
    """Fold an adapter into its base model, verified by reloading."""
    api = started(log_level, log_format, log_file)
    merged = api.merge(path, output_dir, base=base, save_dtype=save_dtype, max_shard_size=max_shard_size)
    return Answer(document={"merged": merged}, view=lambda screen: screen.out(f"merged: {merged}", highlight=False))


def _prompt(given: str | None) -> str:
    if given is not None:
        return given
    if sys.stdin.isatty():
        raise LuthierError("usage", "no prompt is given", remedy="Write it behind the model, or pipe it in.")
    return sys.stdin.read().removesuffix("\n")
