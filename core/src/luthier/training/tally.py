"""The tally of a run: what it has done so far, and the numbers of its last steps."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from luthier.errors import LuthierError
from luthier.step.losses.meter import divide_sums
from luthier.step.update import Update, pooled_loss


@attrs.define(kw_only=True)
class Tally:
    """The counts and numbers of a run so far; part of every checkpoint."""

    step: int = 0
    epoch: float = 0.0  # epochs so far, with the part of the last one
    tokens: int = 0
    supervised_tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_metric: float | None = None
    evaluation: dict[str, float] = attrs.field(factory=dict)
    losses: list[float] = attrs.field(factory=list)
    skipped_steps: int = 0  # steps whose loss or gradient was not finite
    token_limit: int | None = None  # the limit of a micro-batch, if it was lowered because memory ran out
    batch: int | None = None  # samples of a step when the run began, by which its schedule counts
    held: float = 0.0  # steps of the schedule that moved no weight

    def count(self, done: Update, epoch: float, token_limit: int | None) -> None:
        """Add one step, after which `epoch` epochs are done."""
        self.step += 1
        self.epoch, self.token_limit = epoch, token_limit
        self.tokens += done.tokens
        self.supervised_tokens += done.supervised_tokens
        self.samples += done.documents
        self.seconds += done.seconds
        self.skipped_steps += not (done.finite or done.overflowed)
        self.losses.append(done.loss)

    def numbers(self, updates: Sequence[Update], peak_memory: float) -> dict[str, float]:
        """Return the numbers of the steps since the last logging, by name; `peak_memory` in bytes."""
        seconds = max(sum(u.seconds for u in updates), 1e-9)
        samples, micro_batches = sum(u.documents for u in updates), sum(u.micro_batches for u in updates)
        taken = [u for u in updates if u.finite] or updates[-1:]
        numbers = {
            "loss": pooled_loss(list(taken)),
            "grad_norm": taken[-1].grad_norm,
            "learning_rate": updates[-1].learning_rate,
            "epoch": self.epoch,
            "tokens": sum(u.tokens for u in updates),
            "supervised_tokens": sum(u.supervised_tokens for u in updates),
            "total_tokens": self.tokens,
            "num_samples": samples,
            "samples": self.samples,
            "micro_batches": micro_batches / len(updates),
            "tokens_per_second": sum(u.tokens for u in updates) / seconds,
            "samples_per_second": samples / seconds,
            "seconds_per_step": seconds / len(updates),
            "seconds_per_micro_batch": seconds / max(micro_batches, 1),
            "peak_memory": peak_memory,
            "elapsed": self.seconds,
            "skipped_steps": self.skipped_steps,
        }
        return {**numbers, **divide_sums([u.metrics for u in updates])}

    def check_rows_left(self, total_steps: int | None) -> None:
        """Raise `recipe-out-of-range` where other rows, of which there are fewer, have nothing left to train on."""
        if total_steps is not None and total_steps <= self.step:
            problem = f"these rows end before the {self.samples} samples that the run has taken"
            remedy = "Raise num_train_epochs or max_steps, or begin with --fresh."
            raise LuthierError("recipe-out-of-range", problem, where="data", remedy=remedy)
