"""The contracts of the kinds beside training: callbacks, operations, exporters, metrics, penalties and trainers."""

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
    """Any object with methods marked `@luthier.event`; what else it may have stands with the events."""


@runtime_checkable
class Operation(Protocol):
    """A faster form of one of the engine's operations; its arguments and result are those of the reference."""

    @abstractmethod
    def __call__(self, *arguments: Any) -> Any:
        """Compute the operation; gradients flow through the result as through the reference's.

        It is given the reference's arguments in their order. `NotImplemented` as the result says that this call is
        not for it: the next implementation computes it. What it raises ends its use in the run. At the first call
        of each kind a sample of the arguments is computed twice and compared: the first tokens, outputs and rows of
        the vocabulary; the whole call where the predicate or a `NotImplemented` declines the sample.
        """
        ...


@runtime_checkable
class Exporter(Protocol):
    """A writer of a trained model in the format of another tool.

    It gets a plain model, merged where there was an adapter or a quantizer; where the record says `quantized`, what
    the run's artifact opens as. An object that is passed in Python says `quantized` itself.
    """

    quantized: bool = False

    @abstractmethod
    def export(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Write the whole model and its tokenizer into the empty folder."""
        ...

    @abstractmethod
    def verify(self, model: Any, tokenizer: Any, folder: Path) -> dict[str, float]:
        """Read the folder back, compare it with the model, and return the differences that were found, by name.

        It raises `LuthierError` where one exceeds the format's bound.
        """
        ...

    def check(self, config: Any) -> None:
        """Raise `LuthierError` for a model that the format cannot hold; only its transformers config is read yet."""


@runtime_checkable
class Metric(Protocol):
    """A number about answers or tokens, as a sum and a count: what is reported is all sums over all counts.

    Its record says which of the two it is about, and that method it must have. A metric over answers may ask for
    `num_answers` of each prompt, drawn at a `temperature` (0: the likeliest tokens, one answer).
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
        """Return the number from the statistics, each added over all prompts; NaN where nothing is counted."""
        return totals[0] / totals[1] if totals[1] else float("nan")

    def score_tokens(self, statistics: TokenStatistics) -> tuple[float, float]:
        """Return the (sum, count) that the supervised tokens of one micro-batch add."""
        raise LuthierError("part-invalid", "a metric over tokens needs score_tokens", where="metric")


@runtime_checkable
class Penalty(Protocol):
    """What is added to the objective of each step for the weights that train, whatever the loss is."""

    @abstractmethod
    def measure(self, groups: Sequence[Group]) -> Tensor | None:
        """Return a scalar of the adapter's groups, with gradient, once a step; None for nothing."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """The loop of another library, which takes every step of a run in the place of Luthier's own.

    The core has the run's folder, lock, record, callbacks and artifact; it loads the model, its quantizer and its
    adapter, reads the rows as prompts, and builds the optimizer.
    """

    @abstractmethod
    def train(self, session: Any) -> None:
        """Take every step of the run, and tell the `TrainerSession` of each as it is done.

        `session.run.stop_reason` is not None once the run is to end after the step that it is in.
        """
        ...

    def check(self, recipe: Any) -> None:
        """Raise `LuthierError` for a recipe that the library cannot run as it is meant; nothing is loaded yet."""
