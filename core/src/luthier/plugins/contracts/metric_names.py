"""Names of the run's own metrics, which no part may use for its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

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
        "tokens",
        "supervised_tokens",
        "total_tokens",
        "samples",
        "tokens_per_second",
        "peak_memory",
        "elapsed",
        "skipped_steps",
        "rank_imbalance",
        "router_aux",
    )
)
PREFIXES: Final = ("eval_", "gradient/", "update_ratio/")


def check_metric_names(names: Iterable[str], where: str) -> None:
    """Raise `part-invalid` if a part's metric has the name of one of the run's own metrics."""
    for name in names:
        if name in RUN_METRICS or name.startswith(PREFIXES):
            remedy = "Give it a name of its own."
            raise LuthierError("part-invalid", "this metric has the name of one of the run's own", where=where,
                               found=name, remedy=remedy)  # fmt: skip
