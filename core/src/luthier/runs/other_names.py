"""The names that other trainers give to a run's numbers, for scripts and dashboards that read theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

Number = Callable[[Mapping[str, float]], float | None]
GIB: Final = 2**30


def _same(name: str) -> Number:
    return lambda metrics: metrics.get(name)


def _scaled(name: str, divisor: float) -> Number:
    return lambda metrics: metrics[name] / divisor if name in metrics else None


#: Their name of a number, and the number by the names of a line of ours. Names that both share are left out.
MINI_TRAINER: Final[dict[str, Number]] = {
    "lr": _same("learning_rate"),
    "avg_loss_backward": _same("loss"),
    "num_loss_counted_tokens": _same("supervised_tokens"),
    "batch_num_loss_counted_tokens": _same("supervised_tokens"),
    "num_total_tokens": _same("tokens"),
    "grad_accum": _same("micro_batches"),
    "avg_time_per_minibatch": _same("seconds_per_micro_batch"),
    "time_per_batch": _same("seconds_per_step"),
    "total_samples_accumulated": _same("samples"),
    "total_tokens_accumulated": _same("total_tokens"),
    "peak_memory_usage_GB": _scaled("peak_memory", GIB),
    "val_loss": _same("eval_loss"),
}
TRL: Final[dict[str, Number]] = {
    "num_tokens": _same("total_tokens"),
    "num_input_tokens_seen": _same("total_tokens"),
    "mean_token_accuracy": _same("accuracy"),
    "eval_mean_token_accuracy": _same("eval_accuracy"),
    "train_runtime": _same("elapsed"),
    "train_samples_per_second": _same("samples_per_second"),
    "train_tokens_per_second": _same("tokens_per_second"),
}
NAMES: Final = {"mini_trainer": MINI_TRAINER, "trl": TRL}


def add_names(metrics: Mapping[str, float], also: Sequence[str]) -> dict[str, float]:
    """Return the metrics with their numbers under the names of other trainers as well; none is replaced."""
    aliases = {
        name: value
        for trainer in also
        for name, number in NAMES[trainer].items()
        if (value := number(metrics)) is not None
    }
    return {**aliases, **metrics}
