"""The protocols: what a part of each kind must have, with defaults for what most parts leave out.

A part may inherit from its protocol, or be any object that has the required members. The required members are abstract
here; `complete_part` adds the defaults of the others.

Torch appears only in annotations. Shapes stand in brackets: T tokens of the packed batch, D documents in it, U units,
P pairs, V entries of the vocabulary, H hidden size.
"""

from __future__ import annotations

import types
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from luthier.errors import LuthierError
from luthier.plugins.contracts.policy_protocol import Policy
from luthier.plugins.contracts.quantizer_protocol import Quantizer
from luthier.plugins.contracts.side_protocols import (
    Benchmark,
    Callback,
    Engine,
    Exporter,
    Metric,
    Operation,
    Penalty,
    Trainer,
)
from luthier.plugins.contracts.values import Context, Group, LossOutput, Progress
from luthier.plugins.providing.provider_protocol import Provider

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Adapter", "Callback", "Exporter", "Loss", "Metric", "Operation", "Optimizer", "Policy", "Provider",
           "Quantizer"]  # fmt: skip


@runtime_checkable
class Adapter(Protocol):
    """The part that decides which weights train. It leaves the class and the module paths of the model as they are.

    `artifact`, `mergeable` and `save_dtype` are taken from the record. An object that is passed in Python has no
    record, and sets them as attributes.
    """

    artifact: str = "adapter"
    mergeable: bool = True
    save_dtype: str | None = None

    @abstractmethod
    def attach(self, model: Any, context: Context) -> Any:
        """Wrap layers in place, whether quantized or not, freeze all other weights, and return the model.

        It is called for every `Context.purpose`. Torch's generators are seeded before, so that the initial values are
        the same each time. Where single rows of the embedding train, `luthier.place_token_rows` wraps it and the head
        by modules of `luthier.TokenRows`; `luthier.check_token_rows` refuses what cannot be.
        """

    @abstractmethod
    def groups(self) -> list[Group]:
        """Return the trainable parameters, each in exactly one group."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes what it computed before `attach`."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as tensors and JSON values, except what `constants` returns."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Copy what `state` returned into the attached adapter's parameters."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the adapter into `folder`, in PEFT's file layout if PEFT has the method.

        If `artifact` is "model", the whole model is written.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Load into the attached adapter what `save` wrote."""

    def merge(self, context: Context) -> Any:
        """Add the adapter to the weights of the model, remove the wrappers, and return the model.

        It is called only if the record says `mergeable`.
        """
        raise LuthierError("part-unsupported", "this adapter cannot be merged", where="adapter")

    def prepare(self, batch: Any) -> Any:
        """Return the batch that the model reads. A prompt method adds virtual tokens to each document here.

        The policy calls it while the adapter is on; the loss still sees the batch without virtual tokens.
        `batch.insert_virtual(count)` makes a prepared batch. It may carry `embeddings` [T', H], and must carry `origin`
        [T'] int64: the index of each token in the loss's batch, ascending, and -1 for a virtual token.
        """
        return batch

    def virtual_tokens(self) -> int:
        """Return the number of tokens that `prepare` puts before each document that does not continue another."""
        return 0

    def prefixes(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return N keys and N values, [N, key-value heads, head dim] each, that attention reads before each document.

        Documents that continue another do not get them again. N is the same in every layer. Positions of the document
        begin after them, and rotary embeddings are not applied to them. The method is called during the forward pass,
        for each layer (from 0), and again if that layer is recomputed. None: this adapter adds no prefix.
        """
        return None

    def generating(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`, changed so that generation sees the virtual tokens.

        An adapter replaces ids by embeddings here, or adds a cache. If it returns `inputs` unchanged, the core derives
        both from `prepare` and `prefixes`.
        """
        return inputs

    def gradients_ready(self) -> None:
        """Read or change the gradients. They are summed over the global batch and not yet clipped."""

    def stepped(self, progress: Progress) -> None:
        """React to an optimizer step. `progress` counts it."""

    def penalty(self) -> Any:
        """Return a scalar that is added to the objective once a step, or None to add nothing."""
        return None

    def constants(self) -> dict[str, Tensor]:
        """Return frozen tensors that a resumed run needs. They are written once, not into every checkpoint."""
        return {}

    def load_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Restore what `constants` returned."""

    def begin_task(self, index: int, total: int) -> None:
        """Prepare for task `index` (from 0) of `total`. It is not called when a task is resumed."""

    def end_task(self, index: int, total: int) -> None:
        """Finish task `index` of `total`. The best weights are loaded, if the run keeps them, and may be changed here.

        The last evaluation and the saved artifact use the weights as this method leaves them.
        """

    def review_task(self, evaluate: Callable[[], float]) -> None:
        """Keep what `end_task` did, or take it back, by what it does to the run's held-out rows.

        `evaluate()` returns the loss over these rows with the weights as they are; every rank calls it equally often.
        This method is called after `end_task`, if the run has held-out rows. The attribute `needs_metrics =
        {"max_loss_rise": "eval_loss"}` names an option that needs them, so that a run without them is refused.
        """


@runtime_checkable
class Loss(Protocol):
    """The objective that a run minimises.

    - `data` is the kind of rows that it takes: "tokens", "preference", "unpaired" or "documents".
    - `couples = "batch"` says that the objective depends on all rows of the global batch together, as InfoNCE does.
      Such a loss implements `scores` and `combine`, from which the core trains.
    - `teacher_reads = (count, temperature)` says that its function for `map_logits` reads of the teacher's logits only
      the `count` largest, and what all others sum up to at that temperature. `teacher_cache` then keeps no more.
    - `aligns` is taken from the record; an object that is passed in Python sets it as an attribute.
    """

    data: str
    couples: str = "nothing"
    aligns: bool = False
    teacher_reads: tuple[int, float] | None = None

    @abstractmethod
    def terms(self, batch: Any) -> dict[str, float]:
        """Return what this micro-batch adds to the denominator of each term, before the forward pass.

        The names are those of `LossOutput.sums`. Both are added up over the global batch, and the objective is
        `sum(sums[name] / terms[name] for name in sums)`. The method is not called for an idle batch.
        """

    @abstractmethod
    def __call__(self, policy: Policy, batch: Any) -> LossOutput:
        """Return the sum of each term over this micro-batch, as a `LossOutput`.

        It is called for an idle batch too, which has labels but no units. The sums must depend on the policy there as
        well, so that every rank runs the same backward pass; their gradient is multiplied by 0.
        """
        ...

    def arrange(self, units: Sequence[Any]) -> Sequence[Any]:
        """Add derived documents to the units of one global batch, before they are packed, and return the units.

        The function must be pure. It returns the same units in the same order, without adding or dropping one.
        """
        return units

    def begin(self, context: Context) -> None:
        """Prepare before the first step of each task; `context.over` may be used. It is not called after a resume."""

    def coefficients(self, batch: Any) -> Tensor | None:
        """Return the derivative of the sum of the terms by each log-probability, [T], or None.

        None means that it is not known before the forward pass. If it is known, a head that trains computes its
        gradient in the forward pass, which saves computing the logits a second time.
        """
        return None

    def scores(self, policy: Policy, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the scores of this micro-batch's units, [U, ...] with gradient, and tensors without, [U, ...] each.

        It is called twice for each micro-batch: first without gradient, to fill `combine`, and again when the gradient
        of the scores is known. `combine` gets the tensors without gradient from the first call.
        """
        raise LuthierError("part-invalid", "a loss with couples = 'batch' needs scores(policy, batch)", where="loss")

    def combine(self, scores: Tensor, fixed: Mapping[str, Tensor]) -> LossOutput:
        """Return the sums of the terms over all units of the global batch, from what `scores` returned for them.

        The units stand in the order of ranks and packing. Each sum must depend on `scores`; `terms` gives its
        denominator. In evaluation the method is called with groups of units as large as a global batch.
        """
        raise LuthierError("part-invalid", "a loss with couples = 'batch' needs combine(scores, fixed)", where="loss")

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as tensors and JSON values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""


@runtime_checkable
class Optimizer(Protocol):
    """The rule that turns gradients into a step.

    `separable = True` says that the update of each parameter depends on that parameter alone. The core may then step
    the parameters one part after the other, which takes less memory with bfloat16 weights.
    """

    separable: bool = False

    @abstractmethod
    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        """Return a torch optimizer over the groups (see `Group.settings`). The core sets `lr` before every step."""
        ...

    def estimate_gradients(self, objective: Callable[[], float], seed: int) -> None:
        """Fill the gradients of the parameters from values of the objective alone; by default backward computes them.

        It is for optimizers without backward, whose record needs "closure". An optimizer that has this method is asked
        in every step before `step`, and no activation is kept. `objective()` returns the loss of the global batch,
        penalties included, at the weights as they are, with the same random numbers at each call; every rank must call
        it equally often. `seed` (below 2^63) follows from the run's seed and the step. The weights must have the same
        bits afterwards, also if `objective` raises. A gradient that is not finite leaves the step out.
        """

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context for evaluation and saving, in which the parameters hold the weights to be used.

        It is for optimizers that evaluate other weights than they step, such as an average. Entering it a second time
        inside itself must change nothing. At the end of a run it is entered and not left.
        """
        return nullcontext()


PROTOCOLS: Final[Mapping[str, type]] = types.MappingProxyType(
    {
        "adapter": Adapter,
        "loss": Loss,
        "optimizer": Optimizer,
        "quantizer": Quantizer,
        "provider": Provider,
        "callback": Callback,
        "operation": Operation,
        "exporter": Exporter,
        "metric": Metric,
        "penalty": Penalty,
        "trainer": Trainer,
        "benchmark": Benchmark,
        "engine": Engine,
    }
)
