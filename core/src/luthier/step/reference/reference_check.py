"""The check before the first step: a reference that is the policy as it begins gives the policy's own numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.errors import LuthierError
from luthier.model.weights.initial_weights import InitialWeights
from luthier.step.over_batches import run_over
from luthier.step.reference.cached_reference import CachedReference
from luthier.step.reference.cached_teacher import CACHE, CachedTeacher

if TYPE_CHECKING:
    from luthier.data.batches.batch import Batch
    from luthier.model.policy import ModelPolicy
    from luthier.step.setup import Setup


def begin_companions(setup: Setup) -> None:
    """Let the reference be the policy as it stands before the first step, and hold the two against each other."""
    reference = setup.constant_owners.get("reference")
    if isinstance(reference, InitialWeights):
        reference.capture()
    check_reference(setup)
    cache = setup.constant_owners.get("reference_cache")
    if isinstance(cache, CachedReference):
        cache.fill(setup)
        # the model of the reference is not used again
        if not cache.derives and setup.companions.reference != "disabled":
            cache.live = None
            setup.constant_owners.pop("reference", None)
    taught = setup.constant_owners.get(CACHE)
    if isinstance(taught, CachedTeacher):
        taught.fill(setup)
        taught.live = None  # the teacher is not used again


def check_reference(setup: Setup) -> None:
    """Raise `part-invalid` where policy and reference differ before the first step, with dropout off."""
    if not setup.companions.begins_equal:
        return
    apart = [float(distance) for distance in run_over(setup, setup.context.batches(1), _distance)]
    full = not setup.precision.is_low and setup.model.dtype.itemsize > 2
    if max(apart, default=0.0) > rounding_bound(full=full):
        problem = f"before the first step it differs from the policy: log-probabilities by up to {max(apart):.2g}"
        remedy = "Let disabled() give the model without the adapter, or say in the record how far attaching moves it."
        raise LuthierError("part-invalid", problem, where="reference", remedy=remedy)


def rounding_bound(*, full: bool) -> float:
    """Return how far log-probabilities of the same weights may lie apart; `full` where all is float32 or better."""
    return 1e-4 if full else 0.15


def _distance(policy: ModelPolicy, batch: Batch) -> Any:
    reference: Any = policy.reference()
    live: Any = reference.live if isinstance(reference, CachedReference) else reference
    own, other = policy.token_logprobs(batch), live.token_logprobs(batch)
    return (own - other).abs().max()
