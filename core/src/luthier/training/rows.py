"""The rows of a run: made into examples, with progress, and held against micro-batch and model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import attrs

from luthier.data.formats.wanted import Wanted
from luthier.data.prepare import Prepared, prepare_data
from luthier.data.sets import Progress
from luthier.distributed.turns import first_here
from luthier.distributed.world import World
from luthier.logs import get_logger
from luthier.recipe import Recipe
from luthier.recipe.objects import Objects
from luthier.training.continual.earlier_rows import add_earlier

log = get_logger()
PATIENCE: Final = 1.0  # seconds before a bar is drawn
EVERY: Final = 30.0  # seconds between log lines where there is no terminal


def made_rows(recipe: Recipe, objects: Objects, tokenizer: Any, wanted: Wanted, world: World) -> Prepared:
    """Return the examples, made by one process of a machine before the others; the tokenizer gets their template."""
    if objects.prepared is not None:
        return objects.prepared
    with first_here(world):
        prepared = prepared_data(recipe, objects, tokenizer, wanted)
    if prepared.chat_template is not None:
        tokenizer.chat_template = prepared.chat_template  # the template that was trained on is the one to be saved
    return prepared


def prepared_data(recipe: Recipe, objects: Objects, tokenizer: Any, wanted: Wanted) -> Prepared:
    """Return the rows as token examples."""
    with progress() as seen:
        prepared = prepare_data(recipe.data, tokenizer, seed=recipe.seed, wanted=wanted, progress=seen,
                                given=objects.data, given_validation=objects.eval_data)  # fmt: skip
    if objects.task is None or not objects.task.earlier:
        return prepared
    before = [prepared_data(earlier, Objects(), tokenizer, wanted).train for earlier in objects.task.earlier]
    return attrs.evolve(prepared, train=add_earlier(prepared.train, before, objects.task.replay_share, recipe.seed))


@contextmanager
def progress() -> Iterator[Progress]:
    """Yield a function of (rows done, rows in all) that draws a bar on a terminal, or else logs a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, began = Console(stderr=True), time.monotonic()
    if World.current().rank or not console.is_terminal:
        yield _log_lines(began)
        return
    columns = (TextColumn("tokenising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # without a refresh thread, because processes are forked
    bar = Progress(*columns, console=console, transient=True, auto_refresh=False)
    task = bar.add_task("rows")

    def seen(done: int, total: int) -> None:
        if time.monotonic() - began < PATIENCE:
            return
        bar.start()
        bar.update(task, completed=done, total=total, refresh=True)

    try:
        yield seen
    finally:
        bar.stop()


def _log_lines(began: float) -> Progress:
    last = began

    def seen(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            log.info("tokenising", rows=done, of=total)

    return seen
