"""The setup of a run: all that the loop needs, loaded, checked and attached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
import torch

from luthier.data.batches.batch import Batch
from luthier.data.batches.example_feed import Portion, Reached
from luthier.data.batches.layout import LaidOutFeed, UnitLayout
from luthier.data.batches.micro_batches import rank_batches
from luthier.data.batches.packing import Packing, measure_imbalance
from luthier.data.batches.prefetch import prefetch_pays, prefetch_portions
from luthier.data.examples import TokenDataset
from luthier.data.stream.row_stream import Stream
from luthier.distributed.spread import Spread
from luthier.distributed.world import World
from luthier.hardware.process_settings import Process
from luthier.model.operations.install_operations import Installed
from luthier.plugins.contracts.protocols import Adapter, Loss, Optimizer, Quantizer
from luthier.plugins.contracts.side_protocols import Penalty
from luthier.plugins.contracts.values import Context, Multipliers, Progress
from luthier.precision.dtypes import Precision
from luthier.runs.writing.decisions import Decisions
from luthier.runs.writing.phases import Phases, choose_clock
from luthier.step.evaluation.built_metric import BuiltMetric
from luthier.step.module import Step
from luthier.step.reference.companions import Companions
from luthier.step.schedule.learning_rates import Rates
from luthier.step.schedule.schedule_pace import Pace, resume_pace

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.prepare import Report
    from luthier.recipe.settled import SettledRecipe


# parts whose state is saved separately; a feed's is that after a step
START: Final = "start"  # the owner of the weights before the first step, for penalties of the distance from them
KEPT_APART: Final = ("adapter", "optimizer", "feed", "constant_owners")


@attrs.define(kw_only=True)
class Attempt:
    """How far the ranks are in the attempt that is under way."""

    # True within a collective that all ranks must complete, so that the step cannot be tried again
    closed: bool = False


class ConstantOwner(Protocol):
    """A part that has frozen tensors."""

    def constants(self) -> Mapping[str, Tensor]: ...

    def load_constants(self, constants: Mapping[str, Tensor]) -> None: ...


@attrs.define(kw_only=True, eq=False)
class Setup:
    """Everything the loop needs, and nothing that it has to look up."""

    recipe: SettledRecipe
    model: Any
    tokenizer: Any
    adapter: Adapter
    loss: Loss
    optimizer_part: Optimizer
    quantizer: Quantizer
    step: Step
    context: Context
    optimizer: torch.optim.Optimizer
    rates: Rates
    feed: LaidOutFeed  # where the units of each step come from, laid out
    packing: Packing  # how they become micro-batches
    train: TokenDataset | Stream
    validation: TokenDataset | None
    report: Report
    device: torch.device
    attention: str  # the attention implementation that the model had before the run
    operations: Installed  # the parts of the model that luthier's operations compute
    penalties: tuple[Penalty, ...] = ()  # penalties on the trained weights, besides the adapter's own
    metrics: dict[str, BuiltMetric] = attrs.field(factory=dict)  # metrics of an evaluation besides the loss's own
    has_perplexity: bool = False  # the loss's main term is in nats per token
    decisions: Decisions = attrs.field(factory=Decisions)
    precision: Precision = attrs.field(factory=Precision)
    process: Process = attrs.field(factory=Process)
    undo: ExitStack = attrs.field(factory=ExitStack)  # restores model and process when it is closed
    shown: ExitStack = attrs.field(factory=ExitStack)  # after the run's end, sets the weights that are to be evaluated
    numbers: dict[str, float] = attrs.field(factory=dict)  # what parts have logged since the last step
    companions: Companions = attrs.field(factory=Companions)  # the frozen policies besides the one that trains
    decays: list[float] = attrs.field(  # each optimizer group's own weight decay
        default=attrs.Factory(
            lambda own: [group.get("weight_decay", 0.0) for group in own.optimizer.param_groups], takes_self=True
        )
    )
    pace: Pace = attrs.field(factory=Pace)  # the run's position in its schedule
    phases: Phases = attrs.field(  # where the time goes
        default=attrs.Factory(lambda own: Phases(choose_clock(own.device.type)), takes_self=True)
    )
    world: World = attrs.field(factory=World)  # the processes that train together
    attempt: Attempt = attrs.field(factory=Attempt)  # the attempt at the step that is under way
    progress: Progress = attrs.field(default=attrs.Factory(lambda own: own.progress_after(0, 0.0), takes_self=True))
    constant_owners: dict[str, ConstantOwner] = attrs.field(  # whose frozen tensors are kept once
        default=attrs.Factory(lambda own: {"adapter": own.adapter}, takes_self=True)
    )
    spread: Spread = attrs.field(default=attrs.Factory(lambda own: Spread(module=own.step), takes_self=True))

    @property
    def stateful_parts(self) -> dict[str, Any]:
        """Return the objects that have a state of their own, by name, besides those that a checkpoint keeps apart."""
        parts = {field.name: getattr(self, field.name) for field in attrs.fields(type(self))}
        own_parts = {name: part for name, part in parts.items() if name not in KEPT_APART}
        return {name: part for name, part in own_parts.items() if callable(getattr(part, "state", None))}

    def frozen_tensors(self) -> dict[str, list[Tensor]]:
        """Return what the run holds besides its model: the tensors of its companions, and its start's for penalties."""
        frozen = self.companions.held_by(self.step.policy, self.constant_owners)
        start = self.constant_owners.get(START)
        return frozen if start is None else {**frozen, START: list(start.constants().values())}

    @property
    def is_sharded(self) -> bool:
        """Return True where each rank holds only its part of every weight."""
        return self.spread.strategy == "fsdp"

    @property
    def layout(self) -> UnitLayout:
        """Return how units are laid out before they are packed."""
        return self.feed.layout

    def progress_after(self, step: int, epoch: float) -> Progress:
        """Return where the run stands once `step` steps are done."""
        return Progress(step=step, total_steps=self.feed.total, epoch=epoch)

    def rate_of(self, portion: Portion) -> float:
        """Return the schedule's learning rate of a step."""
        return self.rates.between(self.pace.place(portion.step, portion.samples))

    def resume_at(self, reached: Reached, rest: float) -> None:
        """Go on in the schedule where it was; see `resume_pace`."""
        self.pace, rates = resume_pace(self.recipe, self.train, reached, rest)
        self.rates = rates or self.rates

    def tell_progress(self, progress: Progress | None = None) -> Multipliers:
        """Tell the quantizer what is done (None: as before), as before every run of the model; returns its factors."""
        self.progress = progress or self.progress
        return self.quantizer.progressed(self.progress)

    def portions(self, first: int) -> Iterator[Portion]:
        """Return the portions of step `first` (from 0) and of those after it, made ahead where that pays."""
        portions = self.feed.portions(first)
        streaming = not isinstance(self.train, TokenDataset)
        if not self.decisions.take("prefetch", lambda: prefetch_pays(self.device, streaming=streaming)):
            return portions
        return prefetch_portions(
            portions, lambda portion: (self.packing, list(self.micro_batches(portion))), self.device
        )

    def micro_batches(self, portion: Portion) -> Iterator[Batch]:
        """This rank's micro-batches of one optimizer step."""
        if portion.ready is not None and portion.ready[0] == self.packing:
            return iter(portion.ready[1])
        return rank_batches(portion.examples, self.packing, self.device)

    def numbers_of(self, portion: Portion | None) -> dict[str, float]:
        """Return what a step's portion says: the steps of one pass over rows in memory, and with several ranks how
        much longer the slowest of each micro-batch takes than all would at equal loads."""
        steps = self.feed.steps_per_epoch if isinstance(self.train, TokenDataset) else None
        numbers: dict[str, float] = {} if steps is None else {"steps_per_epoch": steps}
        if portion is None or self.packing.ranks == 1:
            return numbers
        lengths = self.packing.sizes(portion.examples)
        return {**numbers, "rank_imbalance": measure_imbalance(lengths, self.packing.spread(lengths))}
