"""Checks of penalties of the tokens: what holds for a loss over single documents holds for the sum of their costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
from hypothesis.strategies import SearchStrategy

from luthier.plugins.completion import add_defaults
from luthier.plugins.contracts.values import LossOutput
from luthier.plugins.records import LossRecord, Record
from luthier.testing.drawn_units import DrawnUnit, drawn_units_of, lay_out_units, pack_examples, unit_packs
from luthier.testing.kinds import loss_checks, loss_units
from luthier.testing.kinds.loss_outcome import outcome_of, policy_over, table_of
from luthier.testing.laws import Subject, law
from luthier.testing.strategies import drawn_seeds

if TYPE_CHECKING:
    Drawn = list[DrawnUnit]


class PenaltyLoss:
    """A loss whose only term is the sum of a penalty's costs, as a run adds it up."""

    data = "tokens"

    def __init__(self, penalty: Any) -> None:
        self.penalty = penalty

    def terms(self, batch: Any) -> dict[str, float]:
        from luthier.step.losses.token_penalties import count_tokens

        return {"cost": count_tokens(batch)}

    def __call__(self, policy: Any, batch: Any) -> LossOutput:
        from luthier.step.losses.token_penalties import sum_tokens

        return LossOutput(sums={"cost": sum_tokens(self.penalty, policy, batch)})


@attrs.frozen(kw_only=True, repr=False)
class LossSubject(Subject):
    """A penalty under test as the laws of losses see it."""

    penalty: Subject

    def build(self, options: object) -> Any:
        return add_defaults(PenaltyLoss(self.penalty.build(options)), "loss")


def as_loss(subject: Subject) -> LossSubject:
    """Return the penalty under test as a loss."""
    record = subject.record
    loss_record = LossRecord(name=record.name, summary=record.summary, build=record.build, needs=record.needs)
    return LossSubject(record=loss_record, penalty=subject)


def _of_tokens(record: Record) -> bool:
    return getattr(record, "over", "weights") == "tokens"


def _drawn(strategy: Callable[[Subject], SearchStrategy[Any]]) -> Callable[[Subject], SearchStrategy[Any]]:
    return lambda subject: strategy(as_loss(subject))


@law(when=_of_tokens, drawn=_drawn(unit_packs()), seed=drawn_seeds())
def gives_each_token_a_cost(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """The costs are one number for each token, in the policy's dtype or float32, and they depend on the policy."""
    batch = pack_examples(lay_out_units(as_loss(subject).build(options), drawn))
    policy = policy_over(subject, table_of(batch, seed).requires_grad_(True))
    costs = subject.build(options).measure_tokens(policy, batch)
    shape = list(costs.shape)
    assert shape == [batch.num_tokens], f"costs of shape {shape} for {batch.num_tokens} tokens"
    assert costs.requires_grad, "the costs have no path to the policy"


@law(when=_of_tokens, first=_drawn(unit_packs()), second=_drawn(unit_packs()), seed=drawn_seeds())
def token_costs_add_up(subject: Subject, options: Any, first: Drawn, second: Drawn, seed: int) -> None:
    """Sums and gradients of two micro-batches are those of both packed into one."""
    loss_checks.adds_up_over_micro_batches.function(as_loss(subject), options, first=first, second=second, seed=seed)


@law(when=_of_tokens, drawn=_drawn(unit_packs()), seed=drawn_seeds(), regime=loss_checks.DRAWN_REGIMES)
def token_gradients_are_finite(subject: Subject, options: Any, drawn: Drawn, seed: int, regime: str) -> None:
    """Costs and gradients in float32 are finite, even if a label is certain or nearly impossible."""
    loss_checks.gradient_is_finite.function(as_loss(subject), options, drawn=drawn, seed=seed, regime=regime)


@law(when=_of_tokens, drawn=_drawn(unit_packs()), other=_drawn(drawn_units_of()), seed=drawn_seeds())
def token_costs_do_not_leak(subject: Subject, options: Any, drawn: Drawn, other: DrawnUnit, seed: int) -> None:
    """Changing one document does not change the gradient of the others."""
    check = loss_checks.does_not_leak_between_packed_examples.function
    check(as_loss(subject), options, drawn=drawn, other=other, seed=seed)


@law(when=_of_tokens, drawn=_drawn(unit_packs()), seed=drawn_seeds())
def token_costs_ignore_order(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """Packing the documents in reverse gives the same sum, and each document the same gradient."""
    loss_checks.invariant_to_order_of_documents.function(as_loss(subject), options, drawn=drawn, seed=seed)


@law(when=_of_tokens, drawn=_drawn(unit_packs()), seed=drawn_seeds())
def token_costs_of_idle_batches(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """A batch without units gives a finite sum that depends on the policy, because other ranks wait for it."""
    loss_units.takes_idle_batches.function(as_loss(subject), options, drawn=drawn, seed=seed)


@law(when=_of_tokens, drawn=_drawn(unit_packs()), seed=drawn_seeds())
def declares_the_policies_it_asks(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """The penalty uses `policy.reference()` and `policy.teacher()` only if the record's `needs` names them."""
    loss_units.declares_reference_and_teacher.function(as_loss(subject), options, drawn=drawn, seed=seed)


def live_on_tokens(subject: Subject, options: Any) -> None:
    """A life of the part: the costs of two documents and their gradients."""
    loss = as_loss(subject)
    part = loss.build(options)
    batch = pack_examples(lay_out_units(part, loss_units.plain_units(loss)))
    outcome_of(loss, part, table_of(batch, 0), [batch])
