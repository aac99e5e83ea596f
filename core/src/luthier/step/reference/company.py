"""The company of a policy: its frozen companions found, checked and read, and the adapter that it begins from."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from luthier.errors import LuthierError
from luthier.plugins.completion import has_default
from luthier.step.adapter_start import find_start, load_start
from luthier.step.context import WHOLE, attach_adapter
from luthier.step.reference.cached_reference import OPTION as REFERENCE_CACHE
from luthier.step.reference.cached_reference import CachedReference
from luthier.step.reference.cached_teacher import CACHE, CachedTeacher
from luthier.step.reference.companions import Companions
from luthier.step.reference.frozen_models import FrozenModel, check_same_tokens, find_frozen, read_frozen
from luthier.step.reference.reference_identity import identify_reference, identify_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.plugins.contracts.protocols import Adapter, Loss
    from luthier.plugins.contracts.values import Context, Purpose
    from luthier.recipe import Recipe
    from luthier.recipe.parts import Resolved
    from luthier.step.setup import Setup


@attrs.frozen(kw_only=True, eq=False)
class Company:
    """The models beside the policy that trains. `start` is the folder of the adapter that a fresh run begins from."""

    companions: Companions = attrs.field(factory=Companions)
    models: Mapping[str, FrozenModel] = attrs.field(factory=dict)  # by role
    start: Path | None = None
    begins: bool = False  # True for a fresh start
    plugins: Any = None

    @classmethod
    def of(cls, recipe: Recipe, resolved: Resolved, *, begins: bool = False) -> Company:
        """Return what the recipe names; the start only where a run `begins`."""
        companions = Companions.of(recipe, resolved)
        models = {role: find_frozen(spec, role, resolved.plugins) for role, spec in companions.models.items()}
        start = find_start(recipe) if begins else None
        return cls(companions=companions, models=models, start=start, begins=begins, plugins=resolved.plugins)

    def checked(self, loss: Loss, tokenizer: Any, config: Any) -> Company:
        """Return it; raise where a companion has another vocabulary than the model, and the loss does not align."""
        for role, companion in self.models.items():
            check_same_tokens(companion, role, tokenizer, config, aligns=bool(getattr(loss, "aligns", False)))
        if self.companions.caches_teacher and loss.teacher_reads is None:
            remedy = "Let the loss compare a few likely tokens (distill: top_k, no hidden states), or leave it out."
            raise LuthierError("recipe-conflict", "the loss reads more of the teacher than its likely tokens",
                               where=CACHE, found=True, remedy=remedy)  # fmt: skip
        return self

    def load_start(self, adapter: Adapter, purpose: Purpose) -> None:
        """Let an attached adapter begin from the start's weights; a hollow one has rank 0's afterwards."""
        if self.start is not None and purpose in WHOLE:
            load_start(adapter, self.start)

    def attach(self, adapter: Adapter, model: Any, context: Context) -> Any:
        """Return the model with its adapter, which has the weights of the one that the run begins from."""
        model = attach_adapter(adapter, model, context).train()
        self.load_start(adapter, context.purpose)
        return model

    def join(self, setup: Setup, purpose: Purpose) -> None:
        """Give the policy of a setup its companions; what of them is kept once is kept with the adapter's constants."""
        read = {role: functools.partial(self._read, role, setup, purpose) for role in self.models}
        setup.companions = self.companions
        if self.companions.reference != "none":
            setup.decisions.explicit("reference", self.companions.reference, self.companions.notes()[0])
        policy, cache = setup.step.policy, self._cache(setup, purpose)
        joining = self.companions
        if cache is not None and not (cache.derives or self.companions.reference == "disabled" or self._fills(purpose)):
            joining, read = joining.without_live(), {k: v for k, v in read.items() if k != "reference"}
        taught = self._teacher_cache(setup, purpose)
        if taught is not None and not self._fills(purpose):
            read = {role: reading for role, reading in read.items() if role != "teacher"}
        setup.constant_owners |= joining.join(policy, read)
        if taught is not None:
            taught.live = policy.others.get("teacher")
            policy.others["teacher"] = setup.constant_owners[CACHE] = taught
        if cache is not None:
            cache.live = policy.others.get("reference")
            policy.others["reference"] = setup.constant_owners[REFERENCE_CACHE] = cache

    @contextmanager
    def rehearsed_filling(self, setup: Setup) -> Iterator[dict[str, list[Tensor]]]:
        """Give the caches of a rehearsal, within this context, the models that fill them in a run.

        Yields the tensors that each of these holds besides the policy's own, by role.
        """
        policy, caches = setup.step.policy, find_caches(setup)
        others, lives = dict(policy.others), [cache.live for cache in caches.values()]
        read = {role: functools.partial(self._read, role, setup, "plan") for role in self.models}
        owners = self.companions.join(policy, read)
        held = self.companions.held_by(policy, owners)
        for role, cache in caches.items():
            cache.live, policy.others[role] = policy.others[role], cache
        try:
            yield held
        finally:
            policy.others = others
            for cache, live in zip(caches.values(), lives, strict=True):
                cache.live = live

    def _read(self, role: str, setup: Setup, purpose: Purpose) -> Any:
        model = read_frozen(self.models[role], setup.recipe, setup.device, _read_as(purpose), self.plugins)
        setup.precision.lower_companion(model)
        return model

    def _cache(self, setup: Setup, purpose: Purpose) -> CachedReference | None:
        """Return the empty cache of the reference's log-probabilities; None where none is asked for."""
        if not self.companions.cached or purpose == "open":
            return None
        derives = not has_default(setup.loss, "loss", "arrange")
        sharded = setup.spread.strategy == "fsdp"
        return CachedReference(identify_reference(setup), derives=derives, sharded=sharded)

    def _teacher_cache(self, setup: Setup, purpose: Purpose) -> CachedTeacher | None:
        """Return the empty cache of the teacher's likely tokens; None where none is asked for."""
        reads = setup.loss.teacher_reads
        if not self.companions.caches_teacher or purpose == "open" or reads is None:
            return None
        vocabulary = setup.model.config.get_text_config().vocab_size
        return CachedTeacher(identify_teacher(setup), reads, vocabulary, blank=purpose == "plan")

    def _fills(self, purpose: Purpose) -> bool:
        return self.begins and purpose != "plan"


def find_caches(setup: Setup) -> dict[str, CachedReference]:
    """Return the caches of a run by the role of whom they stand for, in the order in which they are filled."""
    owners = {"reference": setup.constant_owners.get(REFERENCE_CACHE), "teacher": setup.constant_owners.get(CACHE)}
    return {role: owner for role, owner in owners.items() if isinstance(owner, CachedReference)}


def _read_as(purpose: Purpose) -> Purpose:
    """Return what a frozen model is read for: every rank that trains reads its own whole."""
    return "plan" if purpose == "plan" else "open"
