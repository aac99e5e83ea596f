"""The case: a run that is about to be loaded, and what of it is known before."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch

from luthier.data.batches.layout import UnitLayout
from luthier.data.examples import TokenExample
from luthier.hardware.free_memory import Capacity, measure_capacity
from luthier.memory.dry_run import Footprint, Rehearsal
from luthier.memory.sharded import divide_footprint
from luthier.model.model_config import config_of
from luthier.plugins.contracts.values import Purpose
from luthier.recipe.objects import TaskPlace
from luthier.recipe.reading.draft import default_of
from luthier.recipe.settled import SettledRecipe, settle_recipe
from luthier.runs.writing.decisions import Decisions
from luthier.step.fit_checks import check_prompts
from luthier.step.losses.unit_layout import choose_layout

if TYPE_CHECKING:
    from luthier.data.prepare import Prepared
    from luthier.plugins.contracts.protocols import Loss
    from luthier.recipe import Recipe
    from luthier.recipe.objects import Objects
    from luthier.recipe.parts import Resolved

OPTION: Final = "max_tokens_per_device"
SUGGESTED: Final = ("global_batch_size", "learning_rate")  # further settings that may be `auto`
Turns = list[list[TokenExample]]  # the examples of each micro-batch, the largest first


@attrs.define(kw_only=True, eq=False, slots=False)
class Case:
    """A run about to be loaded. `recipe` is the one that was asked for; `numbers` are decided for what it leaves open.

    `shares` processes train together, and `ranks_here` of them share this machine's memory. `sharded` is True where
    each process holds only its part of every weight.
    """

    recipe: Recipe
    resolved: Resolved
    loss: Loss
    device: torch.device
    prepared: Prepared
    objects: Objects
    packing: bool
    numbers: dict[str, Any] = attrs.field(factory=dict)
    shares: int = 1
    purpose: Purpose = "train"
    ranks_here: int = 1
    sharded: bool = False

    @property
    def task(self) -> TaskPlace:
        """The run's place among several tasks; of a plain run, the only one of one."""
        return self.objects.task or TaskPlace()

    @property
    def tokens(self) -> int | None:
        """Tokens of a micro-batch at most; None while that is not decided."""
        tokens = self.numbers.get(OPTION, self.recipe.max_tokens_per_device)
        return None if tokens == "auto" else tokens

    def settle(self, assumed: Mapping[str, float] | None = None) -> SettledRecipe:
        """Return the recipe with the numbers that are decided, and `assumed` ones for those that are not."""
        return settle_recipe(self.recipe, {**(assumed or {}), **self.numbers}, packing=self.packing)

    @cached_property
    def rehearsal(self) -> Rehearsal:
        """Rehearse the run on fake tensors. Raises `Unknown` if it cannot be rehearsed."""
        recipe = self.settle({OPTION: self.longest, **{name: default_of(name) for name in SUGGESTED}})
        made = Rehearsal(recipe, self.resolved, self.device, prepared=self.prepared, model=self.objects.model,
                         task=self.task)  # fmt: skip
        if self.tokens is not None:
            check_prompts(self.prepared, recipe, made.setup.packing, made.setup.model)
        return made

    def footprint(self, turns: Turns) -> Footprint:
        """Return the predicted peak memory of one rank; under FSDP its shards are divided by the number of ranks."""
        footprint = self.rehearsal.footprint(turns)
        if not self.sharded:
            return footprint
        setup = self.rehearsal.setup
        return divide_footprint(footprint, setup.model, self.shares,
                                shards_reference=setup.companions.reference == "kept")  # fmt: skip

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest example; of a stream, the most that one may have."""
        sets = (self.prepared.train, self.prepared.validation)
        return max(self.layout.longest_unit(s) for s in sets if s is not None)

    @cached_property
    def layout(self) -> UnitLayout:
        """Return how the units of the case's rows are laid out."""
        model = self.objects.model
        config = config_of(self.recipe.model) if model is None else getattr(model, "config", None)
        return choose_layout(self.recipe, self.loss, self.prepared.train, config, model, Decisions(is_logged=False))

    @cached_property
    def room(self) -> Capacity:
        """Return the memory that the device has for the run; memory of a loaded model counts as free."""
        capacity, model = measure_capacity(self.device), self.objects.model
        capacity = attrs.evolve(capacity, free=capacity.free // (self.ranks_here if self.device.type == "cpu" else 1))
        loaded = [] if model is None else [p for p in model.parameters() if p.device == self.device]
        return attrs.evolve(capacity, free=capacity.free + sum(p.numel() * p.element_size() for p in loaded))
