"""The strategy: a copy of the model in each process, or a shard of it where a copy would not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from luthier.data.stream.row_stream import sampled_rows
from luthier.distributed.spread import Strategy
from luthier.distributed.world import World
from luthier.errors import LuthierError
from luthier.model.recurrent import separation_reason
from luthier.sizes import size_text

if TYPE_CHECKING:
    from luthier.memory.case import Case
    from luthier.runs.writing.decisions import Decisions

OPTION: Final = "distributed.strategy"


def choose_strategy(case: Case, decisions: Decisions, world: World) -> Strategy:
    """Return what the recipe asks for; `auto` compares a copy's predicted memory with what the device has.

    Raises `recipe-conflict` where a model that the caller has loaded would have to be taken apart, `part-unsupported`
    where units of several documents would be run one by one on sharded ranks.
    """
    asked = case.recipe.distributed.strategy
    if world.size == 1:
        if asked != "auto" and case.purpose != "open":  # who opens a run's model trains nothing
            decisions.explicit(OPTION, "alone", f"one process trains, where the recipe asks for {asked}")
        return "alone"
    if asked == "fsdp" and case.objects.model is not None:
        remedy = "Pass the model's name or folder, or leave it to ddp."
        raise LuthierError("recipe-conflict", "a loaded model cannot be sharded", where=OPTION, found=asked,
                           remedy=remedy)  # fmt: skip
    chosen: Strategy = (
        decisions.explicit(OPTION, asked) if asked != "auto" else decisions.take(OPTION, lambda: _by_memory(case))
    )
    if chosen == "fsdp":
        _check_documents(case)
    return chosen


def _check_documents(case: Case) -> None:
    """Raise `part-unsupported` where ranks would run the sharded body a different number of times."""
    from luthier.model.model_config import config_of

    rows = case.prepared.train
    has_several = len(sampled_rows(rows).names) > 1 or case.layout.arrange is not None
    reason = separation_reason(config_of(case.recipe.model)) if has_several else None
    if reason is not None:
        problem = (
            f"{reason}, so that each document is run alone, and sharded ranks with unlike units would wait for ever"
        )
        remedy = "Set distributed.strategy: ddp."
        raise LuthierError("part-unsupported", problem, where=OPTION, found="fsdp", remedy=remedy)


def _by_memory(case: Case) -> tuple[Strategy, str]:
    from luthier.memory.dry_run import Unknown
    from luthier.memory.fit import fullest_batches, surely_fits

    if case.objects.model is not None:
        return "ddp", "every process has the model already"
    if surely_fits(case.recipe, None, case.tokens or 0, case.longest, case.room.free):
        return "ddp", "a copy in each process fits by far"
    try:
        setup = case.rehearsal.setup
        peak = case.footprint(fullest_batches(setup.feed, setup.packing, setup.train)).peak
    except Unknown as error:
        return "ddp", f"memory cannot be predicted before the model is loaded ({error})"
    reason = f"a copy takes {size_text(peak)}, and {size_text(case.room.free)} are free for each process"
    return ("fsdp", reason) if peak > case.room.free else ("ddp", reason)
