"""The protocols of callbacks, operations, exporters, metrics, penalties, trainers, benchmarks and engines."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from luthier.errors import LuthierError
from luthier.plugins.contracts.policy_protocol import Policy
from luthier.plugins.contracts.values import BenchmarkScore, EngineQuestion, Group, TokenStatistics

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Callback(Protocol):
    """Any object that has methods marked `@luthier.event`. "Events" below lists the events and the other members."""


@runtime_checkable
class Operation(Protocol):
    """A faster implementation of one of the engine's operations, with the reference's arguments and result."""

    @abstractmethod
    def __call__(self, *arguments: Any) -> Any:
        """Compute the operation. The result must be differentiable by the same arguments as the reference's.

        All arguments are given by position, in the order of the reference. Return `NotImplemented` to leave a call to
        the next implementation. If the operation raises, it is not used any more in this run.

        The first call of each kind is checked: the operation and the reference compute a sample of the arguments (the
        first tokens, outputs and rows of the vocabulary), and the results are compared. If the predicate or a
        `NotImplemented` declines the sample, the whole call is compared.
        """
        ...


@runtime_checkable
class Exporter(Protocol):
    """The part that writes a trained model in the format of another tool.

    It gets a plain transformers model; an adapter or quantizer is merged before. If the record says `quantized`, it
    gets the model with the quantizer's layers instead. An object that is passed in Python sets `quantized` as an
    attribute.
    """

    quantized: bool = False

    @abstractmethod
    def export(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Write the model and its tokenizer into `folder`, which is empty."""
        ...

    @abstractmethod
    def verify(self, model: Any, tokenizer: Any, folder: Path) -> dict[str, float]:
        """Read the folder back, compare it with the model, and return the measured differences by name.

        Raises:
            LuthierError: a difference exceeds the bound of the format.
        """
        ...

    def check(self, config: Any) -> None:
        """Raise `LuthierError` if the format cannot hold a model of this transformers config.

        It is called before any weight is read.
        """


@runtime_checkable
class Metric(Protocol):
    """A number about generated answers or about tokens, reported as the sum of all sums over the sum of all counts.

    A metric over answers implements `score_answer` or `score_answers`, a metric over tokens `score_tokens`. A metric
    over answers may ask for `num_answers` of each prompt, sampled at `temperature`; 0 takes the most likely token each
    time, which allows one answer only.

    `over`, `wants` and `greater_is_better` are taken from the record. An object that is passed in Python sets them as
    attributes; its name is its attribute `name`, or else its class's.
    """

    over: str = "answers"
    wants: tuple[str, ...] = ()
    greater_is_better: bool | None = True
    num_answers: int = 1
    temperature: float = 0.0

    def score_answer(self, prediction: str, reference: str) -> tuple[float, float]:
        """Return (sum, count) of one generated answer."""
        raise LuthierError("part-invalid", "a metric over answers needs score_answer", where="metric")

    def score_answers(self, predictions: Sequence[str], reference: str) -> Sequence[float]:
        """Return (sum, count) of all answers to one prompt, or other statistics that `conclude` understands."""
        return self.score_answer(predictions[0], reference)

    def conclude(self, totals: Sequence[float]) -> float:
        """Return the metric from the statistics, added up over all prompts. NaN if nothing was counted."""
        return totals[0] / totals[1] if totals[1] else float("nan")

    def score_tokens(self, statistics: TokenStatistics) -> tuple[float, float]:
        """Return (sum, count) of the supervised tokens of one micro-batch."""
        raise LuthierError("part-invalid", "a metric over tokens needs score_tokens", where="metric")


@runtime_checkable
class Penalty(Protocol):
    """A function that is added to the objective of each step, whatever the loss is.

    A penalty of the weights implements `measure`, a penalty of the tokens `measure_tokens`. `over` is taken from the
    record.
    """

    over: str = "weights"

    def measure(self, groups: Sequence[Group]) -> Tensor | None:
        """Return a scalar with gradient, computed from the trained parameters, or None to add nothing.

        It is called once a step. `groups` are the adapter's.
        """
        raise LuthierError("part-invalid", "a penalty of the weights needs measure", where="penalty")

    def measure_tokens(self, policy: Policy, batch: Any) -> Tensor:
        """Return the cost of each token, [T] with gradient. Only supervised tokens count, each by its weight.

        The objective gets the sum over the global batch, divided by the sum of the weights. The method is called for
        each micro-batch in training, and for an idle one, as a loss is. Evaluation does not call it.
        """
        raise LuthierError("part-invalid", "a penalty of the tokens needs measure_tokens", where="penalty")

    def begin(self, groups: Sequence[Group]) -> None:
        """Take the adapter's groups as they were before the first step: copies, in the order of those of `measure`.

        It is called once before the first step of a run, and of each task, and in a resumed run with the same values.
        The copies are made only for a penalty that has this method.
        """


@runtime_checkable
class Trainer(Protocol):
    """The training loop of another library, which runs instead of Luthier's own.

    The core loads the model with its quantizer and adapter, reads the rows as prompts, builds the optimizer, and keeps
    the run's folder, lock, record, callbacks and artifact.
    """

    @abstractmethod
    def train(self, session: Any) -> None:
        """Run all steps, and report each to the `luthier.TrainerSession` as soon as it is done.

        Return after the current step if `session.run.stop_reason` is not None.
        """
        ...

    def check(self, recipe: Any) -> None:
        """Raise `LuthierError` if the library cannot run this recipe as written, before anything is loaded."""

    def check_rows(self, recipe: Any, rows: Sequence[Any], validation: Sequence[Any]) -> None:
        """Raise `LuthierError` for prompts that it cannot train on, before the model is loaded."""

    def state(self) -> dict[str, Any] | None:
        """Return what the next step needs besides weights, optimizer and seed, as tensors and JSON values.

        `TrainerSession.step_ended` calls it for a checkpoint. A resumed run gets it back as `TrainerSession.resumed`.
        Without this method a run of the trainer cannot be resumed.
        """
        return None


@runtime_checkable
class Benchmark(Protocol):
    """A collection of tasks with numbers of their own, over which a trained model is measured as it is."""

    @abstractmethod
    def check(self, tasks: Sequence[str]) -> None:
        """Raise `LuthierError` for a task that it does not have, before any weight is read."""
        ...

    @abstractmethod
    def run(self, model: Any, tasks: Sequence[str]) -> Sequence[BenchmarkScore]:
        """Return the numbers of these tasks. `model` is a `luthier.BenchmarkModel`.

        Raises:
            LuthierError: the rows of a task cannot be had.
        """
        ...


@runtime_checkable
class Engine(Protocol):
    """A program that has the trained model loaded, such as a server, and answers prompts in the core's place."""

    @abstractmethod
    async def check(self) -> str:
        """Return what answers, in words: the model and where it is. It is called before any row is read.

        Raises:
            LuthierError: it cannot answer.
        """
        ...

    @abstractmethod
    async def answer(self, questions: Sequence[EngineQuestion], advance: Callable[[int], None]) -> Sequence[str]:
        """Return the text that follows each prompt, in the order of the questions, without special tokens.

        The prompt's tokens are the model's exact input: nothing may be added to them. Call `advance(n)` when n more
        questions are answered.

        Raises:
            LuthierError: a question was not answered.
        """
        ...
