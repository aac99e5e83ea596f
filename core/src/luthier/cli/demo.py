"""`luthier demo`: a whole fine-tuning, from rows to a merged model, on the embedded model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import attrs
import typer

from luthier.cli.screen.answers import Answer
from luthier.cli.screen.flags import Json, LogFile, LogFormat, LogLevel, start_api

if TYPE_CHECKING:
    from rich.console import Console

ANSWER: Final = 32  # tokens of a sample answer
QUESTION: Final = "Use the tool wolfram. What is the distance between London and Paris?"


def demo(
    *,
    folder: Annotated[Path | None, typer.Option(help="The run's folder; without it, a new one in runs/.")] = None,
    seed: Annotated[int, typer.Option(help="The seed of order, initialisation and dropout.", min=0)] = 0,
    max_steps: Annotated[int | None, typer.Option(help="Fewer steps, for a shorter demo.", min=1)] = None,
    json: Json = False,
    log_level: LogLevel = "error",
    log_format: LogFormat = "console",
    log_file: LogFile = None,
) -> Any:
    """Fine-tune the embedded model, offline, in about a minute."""
    start_api(log_level, log_format, log_file)
    settings = {} if max_steps is None else {"max_steps": max_steps}
    result = run_demo(folder=folder, seed=seed, quiet=json, **settings)
    return Answer(document=result.to_dict(), view=lambda screen: draw_demo(screen, result))


def draw_demo(screen: Console, result: DemoResult) -> None:
    """Draw loss and answer before and after, what was made, and what to try next."""
    from luthier.cli.screen.tables import draw_commands, draw_section, pairs_table

    before, after = result.eval_loss_before, result.eval_loss_after
    change = f"{(after - before) / before:+.1%} in {result.steps} steps and {result.seconds:.0f} s"
    rows = {"loss before": f"{before:.4f} on rows that are not trained on", "loss after": f"{after:.4f}, {change}"}
    answers = {"asked": result.question, "before": result.sample_before, "after": result.sample_after}
    folders = {"run": result.run, "adapter": result.adapter, "merged": result.merged}
    draw_section(screen, "What it learnt", pairs_table(rows))
    draw_section(screen, "What it answers", pairs_table(answers))
    draw_section(screen, "What it made, each reloaded and compared", pairs_table(folders))
    draw_commands(screen, "Try next", result.next)


@attrs.frozen(kw_only=True)
class DemoResult:
    """The results of the demo: what it measured, the folders that it made, and in `next` two commands to try."""

    eval_loss_before: float
    eval_loss_after: float
    question: str
    sample_before: str
    sample_after: str
    run: str
    adapter: str
    merged: str
    steps: int
    seconds: float
    next: list[str]

    def to_dict(self) -> dict[str, Any]:
        return attrs.asdict(self)


def run_demo(*, folder: str | Path | None = None, seed: int = 0, quiet: bool = False, **settings: Any) -> DemoResult:
    """Train LoRA on the embedded model, evaluate before and after, merge, and open what was written.

    `folder` is the run's folder (None: runs/demo, or the next free name beside it); `quiet` shows no progress bar;
    `settings` change the recipe, such as `max_steps`. Raises `LuthierError`.
    """
    from luthier.api import generate, train
    from luthier.demo import RECIPE
    from luthier.runs.metrics_file import FILE, read_metrics
    from luthier.runs.run_folder import free_folder

    began = time.perf_counter()
    before = generate("demo", QUESTION, max_new_tokens=ANSWER, seed=seed)
    watchers = [*([] if quiet else ["progress"]), "jsonl", "plot"]
    target = free_folder(Path(folder or "runs/demo"))
    with _one_thread():
        result = train(RECIPE, output_dir=target, exact_callbacks=watchers, seed=seed, **settings)
    losses = [line["eval_loss"] for line in read_metrics(result.output_path / FILE) if "eval_loss" in line]
    after = generate(result.merged or result.artifact, QUESTION, max_new_tokens=ANSWER, seed=seed)
    return DemoResult(
        eval_loss_before=losses[0], eval_loss_after=losses[-1], steps=result.steps,
        question=QUESTION, sample_before=before, sample_after=after,
        run=str(result.output_path), adapter=str(result.artifact), merged=str(result.merged),
        seconds=time.perf_counter() - began,
        next=[
            f'luthier generate {result.output_path} "{QUESTION}"',
            "luthier train --model demo --data YOUR.jsonl --adapter lora --learning-rate 1e-3",
        ],
    )  # fmt: skip


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread within this context, because threads only slow down matrices this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
