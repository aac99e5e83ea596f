"""Contracts of the other kinds: callbacks, operations, exporters, metrics, penalties, trainers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from luthier.errors import LuthierError
from luthier.plugins.contracts.values import Group, TokenStatistics

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Callback(Protocol):
    """An object with methods marked `@luthier.event`. The events' page describes its further, optional members."""


@runtime_checkable
class Operation(Protocol):
    """A faster form of one of the engine's operations; its arguments and result are those of the reference."""

    @abstractmethod
    def __call__(self, *arguments: Any) -> Any:
        """Compute the operation; gradients flow through the result as through the reference's.

        It gets the reference's arguments in their order. It returns `NotImplemented` to decline a call, which the next
        implementation then computes. An error that it raises ends its use in the run. At the first call of each kind a
        sample of the arguments (the first tokens, outputs and rows of the vocabulary) is computed by this form and by
        the reference, and compared; if the predicate or a `NotImplemented` declines the sample, the whole call is
        compared.
        """
        ...


@runtime_checkable
class Exporter(Protocol):
    """A writer of a trained model in the format of another tool.

    It gets a plain model, with any adapter merged and any quantized layer made dense. If the record says `quantized`,
    it gets the model as the run's artifact opens. An object that is passed in Python has `quantized` as its own
    attribute.
    """

    quantized: bool = False

    @abstractmethod
    def export(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Write the whole model and its tokenizer into the empty folder."""
        ...

    @abstractmethod
    def verify(self, model: Any, tokenizer: Any, folder: Path) -> dict[str, float]:
        """Read the folder back, compare it with the model, and return the measured differences by name.

        Raises `LuthierError` if one exceeds the format's bound.
        """
        ...

    def check(self, config: Any) -> None:
        """Raise `LuthierError` if the format cannot hold the model.

        At this time only its transformers config is read.
        """


@runtime_checkable
class Metric(Protocol):
    """A number about answers or tokens, as a sum and a count. The reported number is the total sum over the total
    count.

    Its record says which of the two it is about, and so which method it must have. A metric over answers may ask for
    `num_answers` of each prompt, drawn at a `temperature` (0: one answer, of the likeliest tokens).
    """

    num_answers: int = 1
    temperature: float = 0.0

    def score_answer(self, prediction: str, reference: str) -> tuple[float, float]:
        """Return the (sum, count) that one generated answer adds."""
        raise LuthierError("part-invalid", "a metric over answers needs score_answer", where="metric")

    def score_answers(self, predictions: Sequence[str], reference: str) -> Sequence[float]:
        """Return what all answers to one prompt add: a sum and a count, or the statistics that `conclude` reads."""
        return self.score_answer(predictions[0], reference)

    def conclude(self, totals: Sequence[float]) -> float:
        """Return the metric from the statistics, each added over all prompts; NaN if nothing was counted."""
        return totals[0] / totals[1] if totals[1] else float("nan")

    def score_tokens(self, statistics: TokenStatistics) -> tuple[float, float]:
        """Return the (sum, count) that the supervised tokens of one micro-batch add."""
        raise LuthierError("part-invalid", "a metric over tokens needs score_tokens", where="metric")


@runtime_checkable
class Penalty(Protocol):
    """A function of the trained weights that is added to the objective of each step, whatever the loss is."""

    @abstractmethod
    def measure(self, groups: Sequence[Group]) -> Tensor | None:
        """Return a scalar, with gradient, computed from the adapter's groups once a step; None adds nothing."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """The loop of another library, which takes every step of a run instead of Luthier's own loop.

    The core keeps the run's folder, lock, record, callbacks and artifact; it loads the model, its quantizer and its
    adapter, reads the rows as prompts, and builds the optimizer.
    """

    @abstractmethod
    def train(self, session: Any) -> None:
        """Take every step of the run, and report each to the `TrainerSession` when it is done.

        Once `session.run.stop_reason` is not None, the run must end after the step that is under way.
        """
        ...

    def check(self, recipe: Any) -> None:
        """Raise `LuthierError` for a recipe that the library cannot run faithfully. Nothing is loaded at this time."""

    def check_rows(self, recipe: Any, rows: Sequence[Any], validation: Sequence[Any]) -> None:
        """Raise `LuthierError` for prompts that it cannot train on. The model is not loaded at this time."""
