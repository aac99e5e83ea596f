"""The contracts of the parts that train: adapters, losses and optimizers, with defaults for their optional members.

Torch appears only in annotations. Shapes in brackets: T tokens of the packed batch, D documents in it, U units, P
pairs, V vocabulary, H hidden.

A part may inherit from its protocol, or be any object with the required members, which are abstract here;
`complete_part` adds the defaults of the others.
"""

from __future__ import annotations

import types
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from luthier.errors import LuthierError
from luthier.plugins.contracts.policy_protocol import Policy
from luthier.plugins.contracts.quantizer_protocol import Quantizer
from luthier.plugins.contracts.side_protocols import Callback, Exporter, Metric, Operation, Penalty, Trainer
from luthier.plugins.contracts.values import Context, Group, LossOutput, Progress
from luthier.plugins.providing.provider_protocol import Provider

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Adapter", "Callback", "Exporter", "Loss", "Metric", "Operation", "Optimizer", "Policy", "Provider",
           "Quantizer"]  # fmt: skip


@runtime_checkable
class Adapter(Protocol):
    """The part that decides what of the model trains. It keeps the class of the model and the paths of its modules.

    `artifact`, `mergeable` and `save_dtype` come from the record; an object that is passed in Python has them as its
    own attributes.
    """

    artifact: str = "adapter"
    mergeable: bool = True
    save_dtype: str | None = None

    @abstractmethod
    def attach(self, model: Any, context: Context) -> Any:
        """Wrap layers in place, quantized or not, freeze the rest, and return the model.

        It is called for every `Context.purpose`; torch is seeded before, so that the initial values are the same each
        time.
        """

    @abstractmethod
    def groups(self) -> list[Group]:
        """Return every trainable parameter, in exactly one group."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Return a context within which the model computes what it did before `attach`."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return all that a resume needs, as tensors and JSON values, except what `constants` returns."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned, into the parameters that exist."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the adapter alone, in PEFT's layout if PEFT has one for it."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote into the attached adapter."""

    def merge(self, context: Context) -> Any:
        """Return the model with the adapter folded into its weights and the wrappers removed.

        It is called only if the record says `mergeable`.
        """
        raise LuthierError("part-unsupported", "this adapter cannot be merged", where="adapter")

    def prepare(self, batch: Any) -> Any:
        """Return the batch that the body runs on. A prompt method adds virtual tokens to each document.

        The policy calls it, only while the adapter is on; the loss keeps its own batch. `batch.insert_virtual(count)`
        makes such a batch. A prepared batch may carry `embeddings` [T', H] and must carry `origin` [T'] int64: the
        position of each token in the loss's batch, in order, and -1 for a virtual token.
        """
        return batch

    def virtual_tokens(self) -> int:
        """Return how many tokens `prepare` puts before each document, except one that continues an earlier document."""
        return 0

    def prefixes(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return keys and values [N, key-value heads, head dim] that precede each document, except one that continues
        another.

        They count as positions and are not rotated, and every layer has the same number N. It is called within the pass
        for each layer (from 0), and again if the layer is recomputed. None: this adapter adds none.
        """
        return None

    def generating(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of `generate`, with embeddings or a cache that replace the virtual tokens.

        By default they follow from `prepare` and `prefixes`.
        """
        return inputs

    def gradients_ready(self) -> None:
        """Inspect or change the gradients, once those of the global batch are summed and before they are clipped."""

    def stepped(self, progress: Progress) -> None:
        """Take note that the optimizer has stepped."""

    def penalty(self) -> Any:
        """Return a scalar that is added to the objective of the global batch once a step; None adds nothing."""
        return None

    def constants(self) -> dict[str, Tensor]:
        """Return frozen tensors that a resume needs. They are written once, not into every checkpoint."""
        return {}

    def load_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Restore what `constants` returned."""

    def begin_task(self, index: int, total: int) -> None:
        """Prepare for task `index` (from 0) of `total`. It is not called again when a task is resumed."""

    def end_task(self, index: int, total: int) -> None:
        """Finish task `index` of `total`: its best weights are in place, and this method may change them.

        The last evaluation and the artifact come afterwards, and use the weights that it leaves.
        """


@runtime_checkable
class Loss(Protocol):
    """The objective of a run.

    `data` is the kind of rows it takes: "tokens", "preference", "unpaired" or "documents". A loss with `couples =
    "batch"` is a function of the whole global batch and implements `scores` and `combine`. `aligns` comes from the
    record; an object that is passed in Python has it as its own attribute.
    """

    data: str
    couples: str = "nothing"
    aligns: bool = False

    @abstractmethod
    def terms(self, batch: Any) -> dict[str, float]:
        """Return this micro-batch's share of each term's denominator, before the forward pass.

        The names are those of `LossOutput.sums`. The objective is the sum over terms of (sum / denominator), where both
        are added over the global batch. It is not called for an idle batch.
        """

    @abstractmethod
    def __call__(self, policy: Policy, batch: Any) -> LossOutput:
        """Return the sum of each term over this micro-batch.

        It is called for an idle batch too (no units; its tokens carry labels). The sums of an idle batch must depend on
        the policy; their gradient counts as zero.
        """
        ...

    def arrange(self, units: Sequence[Any]) -> Sequence[Any]:
        """Return the units of one global batch with derived documents added, before they are packed.

        It is a pure function: the same units in the same order, none added or dropped.
        """
        return units

    def begin(self, context: Context) -> None:
        """Prepare on a fresh start, once per task, before the first step. It may use `context.over`."""

    def coefficients(self, batch: Any) -> Tensor | None:
        """Return [T] d total / d log-probability, if it is known before the forward pass, else None."""
        return None

    def scores(self, policy: Policy, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return scores [U, ...] with gradient, and further tensors [U, ...] that are stored and not differentiated.

        It is called twice for each micro-batch: first without gradient, then again when the gradient of the scores is
        known. The stored tensors are those of the first call.
        """
        raise LuthierError("part-invalid", "a loss with couples = 'batch' needs scores(policy, batch)", where="loss")

    def combine(self, scores: Tensor, fixed: Mapping[str, Tensor]) -> LossOutput:
        """Return the sums over the whole global batch from the scores and stored tensors of all its units.

        The units are in the order of packing and ranks. Each sum depends on `scores`; `terms` gives its denominator. In
        evaluation it is called with groups of one global batch.
        """
        raise LuthierError("part-invalid", "a loss with couples = 'batch' needs combine(scores, fixed)", where="loss")

    def state(self) -> dict[str, Any]:
        """Return all that a resume needs, as tensors and JSON values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""


@runtime_checkable
class Optimizer(Protocol):
    """The rule by which gradients become a step.

    `separable = True` says that the built optimizer may be stepped with the gradients of some parameters, then with
    those of others, with the same result as one step, because nothing in it goes beyond one parameter. Bfloat16 weights
    then need less memory.
    """

    separable: bool = False

    @abstractmethod
    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        """Return an optimizer over the groups (see `Group.settings`); the loop sets each `lr` before every step."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context for evaluation and saving, for optimizers whose best weights are not those that they step.

        A second one within it changes nothing. At the end of a run it is entered and not left.
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
    }
)
