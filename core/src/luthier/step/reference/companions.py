"""Companions: the frozen policies besides the one that trains, the reference and the teacher, and how each is had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import attrs

from luthier.model.policy import ModelPolicy
from luthier.model.weights.initial_weights import InitialWeights
from luthier.recipe.schema import OtherModel

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.recipe import Recipe
    from luthier.recipe.parts import Part, Resolved

Way = Literal["none", "disabled", "kept", "model"]
NOTES: Mapping[str, str] = {
    "disabled": "the reference is the model with its adapter switched off: no memory, one more forward pass",
    "kept": "the reference is the policy as it begins: a copy of what trains, and one more forward pass",
    "model": "the reference is another model: its weights, and one more forward pass of it",
}


@attrs.frozen(kw_only=True)
class Companions:
    """The frozen policies that a run needs, from the recipe and from what its parts need.

    `reference`: none; the model with its adapter switched off; its initial weights, kept; or another model.
    """

    reference: Way = "none"
    begins_equal: bool = False  # the reference equals the policy at step 0
    cached: bool = False  # the reference's log-probabilities are computed once
    caches_teacher: bool = False  # the teacher's most likely tokens are computed once
    models: Mapping[str, OtherModel] = attrs.field(factory=dict)  # by role: reference, teacher

    @classmethod
    def of(cls, recipe: Recipe, resolved: Resolved) -> Companions:
        """Return those that the loss asks for by its needs, as the recipe says."""
        needs = {tag for part in resolved.chosen() for tag in part.needs}
        way = _way(recipe, resolved.adapter) if "reference" in needs else "none"
        models: dict[str, OtherModel] = {}
        if way == "model" and isinstance(recipe.reference, OtherModel):
            models["reference"] = recipe.reference
        if "teacher" in needs and recipe.teacher is not None:
            models["teacher"] = recipe.teacher
        equal = way in ("disabled", "kept") and recipe.reference != "base"
        return cls(reference=way, begins_equal=equal, cached=recipe.reference_cache, models=models,
                   caches_teacher=recipe.teacher_cache)  # fmt: skip

    def join(self, policy: ModelPolicy, read: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """Give the policy its companions; return the owners of tensors that are kept once.

        `read` gives each model; one that is not in it is not needed here.
        """
        owners: dict[str, Any] = {}
        if self.reference == "disabled":
            policy.others["reference"] = policy.without_adapter()
        elif self.reference == "kept":
            owners["reference"] = InitialWeights(policy.model, policy.adapter.state())
            frozen = owners["reference"].in_place
            policy.others["reference"] = ModelPolicy(policy.model, policy.adapter, frozen=frozen)
        for role in read:
            policy.others[role] = ModelPolicy(read[role](), frozen=nullcontext)
        return owners

    def held_by(self, policy: ModelPolicy, owners: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Return the tensors that each companion holds besides the policy's own; `owners` is what `join` gave."""
        tensors: dict[str, list[Tensor]] = {}
        for role in self.models:
            model = getattr(policy.others.get(role), "model", None)
            tensors[role] = [] if model is None else [*model.parameters(), *model.buffers()]
        if self.reference == "kept" and "reference" in owners:
            tensors["reference"] = list(owners["reference"].constants().values())
        return tensors

    def notes(self) -> list[str]:
        """Return what each of them costs, for the plan."""
        if self.cached:
            notes = [
                "the reference's log-probabilities are computed once, in one pass over the rows before the first step"
            ]
        else:
            notes = [f"{NOTES[self.reference]} in each step"] if self.reference in NOTES else []
        if self.caches_teacher:
            notes.append(
                "the teacher's most likely tokens are computed once, in one pass over the rows before the first step"
            )
        elif "teacher" in self.models:
            notes.append("the teacher is another model: its weights, and one more forward pass of it in each step")
        return notes

    def without_live(self) -> Companions:
        """Return them without a reference that could be asked, as what it said of the rows is kept."""
        return attrs.evolve(self, reference="none", models={k: v for k, v in self.models.items() if k != "reference"})


def _way(recipe: Recipe, adapter: Part) -> Way:
    """Return how the reference is had: an adapter that begins as nothing need only be switched off."""
    if isinstance(recipe.reference, OtherModel):
        return "model"
    begins_as_nothing = recipe.adapter_from is None and not getattr(adapter.record or adapter.local, "tolerance", 0.0)
    can_switch = "reference" in adapter.chosen().provides
    return "disabled" if can_switch and (recipe.reference == "base" or begins_as_nothing) else "kept"
