"""The parts of a run, built, and all that attaching them to a model needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from luthier.distributed.world import World
from luthier.recipe.objects import TaskPlace
from luthier.recipe.parts import named_parts
from luthier.step.reference.company import Company

if TYPE_CHECKING:
    import torch

    from luthier.data.prepare import Prepared
    from luthier.distributed.spread import Strategy
    from luthier.model.operations.signatures import Implementation
    from luthier.plugins.contracts.protocols import Adapter, Loss, Optimizer, Quantizer
    from luthier.plugins.contracts.side_protocols import Penalty
    from luthier.plugins.contracts.values import Purpose
    from luthier.recipe.parts import Part, Resolved
    from luthier.recipe.settled import SettledRecipe
    from luthier.runs.writing.decisions import Decisions


@attrs.frozen(kw_only=True, eq=False)
class BuiltParts:
    """The parts of one run, built. `kernels` are the operations that it may use, `company` is beside its policy."""

    adapter: Adapter
    loss: Loss
    optimizer: Optimizer
    quantizer: Quantizer
    penalties: Mapping[str, Penalty] = attrs.field(factory=dict)
    kernels: list[Implementation] = attrs.field(factory=list)
    company: Company = attrs.field(factory=Company)
    dropout: bool = True  # False: the loss wants none that is not asked for

    @classmethod
    def of_recipe(cls, resolved: Resolved, build: Callable[[Part], Any] | None = None) -> BuiltParts:
        """Build the four parts that every run has, and the penalties; `build` None: as the run itself does."""
        build = build or resolved.build
        return cls(
            adapter=build(resolved.adapter),
            loss=build(resolved.loss),
            optimizer=build(resolved.optimizer),
            quantizer=build(resolved.quantizer),
            penalties={name: build(part) for name, part in named_parts(resolved.penalties).items()},
            dropout=getattr(resolved.loss.record or resolved.loss.local, "dropout", True),
        )

    def objects(self) -> list[Any]:
        """Return the objects that plugins have built."""
        return [self.adapter, self.loss, self.optimizer, self.quantizer, *self.penalties.values()]

    @property
    def weight_penalties(self) -> tuple[Penalty, ...]:
        """Return the penalties of the weights that train."""
        return tuple(penalty for penalty in self.penalties.values() if penalty.over == "weights")


@attrs.frozen(kw_only=True, eq=False)
class Attachment:
    """A model, what is attached to it, and for which purpose. `tokenizer` is None where nothing is generated."""

    recipe: SettledRecipe
    model: Any
    tokenizer: Any
    parts: BuiltParts
    prepared: Prepared
    device: torch.device
    decisions: Decisions
    world: World = attrs.field(factory=World)
    spread_as: Strategy = "alone"
    purpose: Purpose = "train"
    task: TaskPlace = attrs.field(factory=TaskPlace)
    attached: Callable[[Attachment, Any], None] | None = None  # called with the model that has its adapter
