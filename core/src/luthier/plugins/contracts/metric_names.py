"""Names of the run's own metrics, which no part may use for its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from luthier.errors import LuthierError

RUN_METRICS: Final = frozenset(
    (
        "loss",
        "penalty",
        "perplexity",
        "grad_norm",
        "learning_rate",
        "step",
        "epoch",
        "steps_per_epoch",
        "format",
        "timestamp",
        "tokens",
        "supervised_tokens",
        "total_tokens",
        "num_samples",
        "samples",
        "micro_batches",
        "tokens_per_second",
        "samples_per_second",
        "seconds_per_step",
        "seconds_per_micro_batch",
        "peak_memory",
        "elapsed",
        "skipped_steps",
        "rank_imbalance",
        "router_aux",
    )
)
SECONDS: Final = "seconds/"  # and a phase: what was spent in it since the last line
PREFIXES: Final = ("eval_", "penalty/", "gradient/", "update_ratio/", SECONDS)


#: Names whose values two equal runs do not share, besides those that begin with `SECONDS`.
TIMED: Final = frozenset(("timestamp", "elapsed", "tokens_per_second", "samples_per_second", "seconds_per_step",
                          "seconds_per_micro_batch", "peak_memory"))  # fmt: skip


def repeatable_numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a line of metrics an equal run has too: all but times, rates and memory."""
    return {name: value for name, value in line.items() if name not in TIMED and not name.startswith(SECONDS)}


def check_metric_names(names: Iterable[str], where: str) -> None:
    """Raise `part-invalid` if a part's metric has the name of one of the run's own metrics."""
    for name in names:
        if name in RUN_METRICS or name.startswith(PREFIXES):
            remedy = "Give it a name of its own."
            raise LuthierError("part-invalid", "this metric has the name of one of the run's own", where=where,
                               found=name, remedy=remedy)  # fmt: skip
