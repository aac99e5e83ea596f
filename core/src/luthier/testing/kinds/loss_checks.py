"""Checks of losses: sums add up over any split, count supervised tokens only, and have finite gradients.

Losses run on a `TablePolicy`, so that every value is exact and of any size, over units as their record declares
them: single documents, pairs, judged answers, with columns. `loss_units` adds checks of whole units and models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

import attrs
from hypothesis import strategies as st

from luthier.plugins.completion import has_default
from luthier.plugins.records import Record
from luthier.testing.drawn_units import DrawnUnit, drawn_units_of, lay_out_units, pack_examples, unit_packs
from luthier.testing.kinds import loss_units
from luthier.testing.kinds.loss_outcome import assert_same, built_loss, couples_batch, outcome_of, policy_over, table_of
from luthier.testing.laws import Subject, law, not_run
from luthier.testing.strategies import drawn_seeds

if TYPE_CHECKING:
    Drawn = list[DrawnUnit]

REGIMES: Final = {"usual": 0.0, "certain": 17.3, "sure": 1e4, "impossible": -1e4}  # a label's logit minus all others
DRAWN_REGIMES: Final = st.sampled_from(tuple(REGIMES))
COUPLED: Final = "the loss couples the batch, so that a sum is no sum over its units"

takes_idle_batches = loss_units.takes_idle_batches
arrange_is_a_pure_function = loss_units.arrange_is_a_pure_function
terms_name_every_sum = loss_units.terms_name_every_sum
metrics_have_names_of_their_own = loss_units.metrics_have_names_of_their_own
declares_reference_and_teacher = loss_units.declares_reference_and_teacher
reads_of_the_teacher_what_it_says = loss_units.reads_of_the_teacher_what_it_says
state_survives_a_checkpoint = loss_units.state_survives_a_checkpoint
prefers_what_the_row_prefers = loss_units.prefers_what_the_row_prefers
agrees_on_a_model = loss_units.agrees_on_a_model


def _on_tokens(record: Record) -> bool:
    return getattr(record, "data", "tokens") == "tokens"


@law(first=unit_packs(), second=unit_packs(), seed=drawn_seeds())
def adds_up_over_micro_batches(subject: Subject, options: Any, first: Drawn, second: Drawn, seed: int) -> None:
    """Sums, denominators, metrics and gradients of two micro-batches are those of both packed into one."""
    loss = built_loss(subject, options, first)
    examples = lay_out_units(loss, [*first, *second])
    parts = [pack_examples(examples[: len(first)]), pack_examples(examples[len(first) :])]
    whole = pack_examples(examples)
    logits = table_of(whole, seed)
    apart, together = outcome_of(subject, loss, logits, parts), outcome_of(subject, loss, logits, [whole])
    assert_same(apart.sums, together.sums, "sums of two micro-batches against those of one with all units")
    assert_same(apart.terms, together.terms, "denominators of two micro-batches against those of one")
    assert_same(apart.metrics, together.metrics, "sum and count of metrics over two micro-batches against those of one")
    assert_same(apart.gradient, together.gradient, "gradients of two micro-batches against those of one")


@law(drawn=unit_packs(), seed=drawn_seeds())
def gives_sums_not_means(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """A batch with every unit twice gives twice every sum and denominator; each sum is a scalar."""
    import torch

    loss = built_loss(subject, options, drawn)
    if couples_batch(loss):
        not_run(COUPLED)
    examples = lay_out_units(loss, drawn)
    logits = table_of(pack_examples(examples), seed)
    once = outcome_of(subject, loss, logits, [pack_examples(examples)])
    twice = outcome_of(subject, loss, torch.cat([logits, logits]), [pack_examples([*examples, *examples])])
    assert_same(twice.sums, {n: 2 * s for n, s in once.sums.items()}, "sums of doubled units against twice the sums")
    assert_same(twice.terms, {n: 2 * t for n, t in once.terms.items()}, "denominators of doubled units")


@law(
    when=lambda r: getattr(r, "data", "") != "documents", drawn=unit_packs(), extra=drawn_units_of(), seed=drawn_seeds()
)
def ignores_unlabelled_tokens(subject: Subject, options: Any, drawn: Drawn, extra: DrawnUnit, seed: int) -> None:
    """Positions that predict no label have no gradient; a document without labels adds 0 to sum and denominator."""
    loss = built_loss(subject, options, drawn)
    batch = pack_examples(lay_out_units(loss, drawn))
    outcome = outcome_of(subject, loss, table_of(batch, seed), [batch])
    used = outcome.sources.union(batch.previous[batch.supervised].tolist())
    unused = [t for t in range(batch.num_tokens) if t not in used]
    assert_same(
        outcome.gradient[unused], outcome.gradient[unused] * 0, "gradient where no label is predicted against 0"
    )
    if not _on_tokens(subject.record):
        return
    (name, document), *_ = extra.documents.items()
    mute = attrs.evolve(extra, documents={name: attrs.evolve(document, supervised=(False,) * len(document.ids))})
    examples = lay_out_units(loss, [*drawn, mute])
    longer, nothing = pack_examples(examples), pack_examples(examples[-1:])
    batch = pack_examples(examples[:-1])
    logits = table_of(longer, seed)
    without = outcome_of(subject, loss, logits[: batch.num_tokens], [batch])
    with_it = outcome_of(subject, loss, logits, [longer])
    assert_same(with_it.sums, without.sums, "sums with a document that has no labels against those without it")
    assert_same(with_it.terms, without.terms, "denominators with a document that has no labels against those without")
    if not couples_batch(loss):
        alone = outcome_of(subject, loss, logits[batch.num_tokens :], [nothing])
        assert_same(alone.sums, {n: 0.0 for n in alone.sums}, "sums of a batch without labels against 0")
        assert_same(alone.terms, {n: 0.0 for n in alone.terms}, "denominators of a batch without labels against 0")


@law(when=_on_tokens, drawn=unit_packs(weights=(1.0,)), seed=drawn_seeds())
def counts_an_example_by_its_weight(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """A document of weight 2 counts like the document twice (`batch.token_weights`)."""
    import torch

    loss = built_loss(subject, options, drawn)
    if couples_batch(loss):
        not_run(COUPLED)
    first, *others = lay_out_units(loss, drawn)
    logits = table_of(pack_examples([first, *others]), seed)
    length = len(first.input_ids)
    weighted = outcome_of(subject, loss, logits, [pack_examples([attrs.evolve(first, weight=2.0), *others])])
    table = torch.cat([logits[:length], logits])
    repeated = outcome_of(subject, loss, table, [pack_examples([first, first, *others])])
    assert_same(weighted.sums, repeated.sums, "sums with a document of weight 2 against those with it twice")
    assert_same(weighted.terms, repeated.terms, "denominators with a document of weight 2 against those with it twice")


@law(drawn=unit_packs(), seed=drawn_seeds(), regime=DRAWN_REGIMES)
def gradient_is_finite(subject: Subject, options: Any, drawn: Drawn, seed: int, regime: str) -> None:
    """Sums and gradients in float32 are finite, even if a label is certain or nearly impossible."""
    import torch

    loss = built_loss(subject, options, drawn)
    batch = pack_examples(lay_out_units(loss, drawn))
    logits = table_of(batch, seed).float()
    if regime != "usual":  # log-probabilities of -2e-7, 0 and -1e4
        logits = logits * 0
        logits[batch.previous[batch.supervised], batch.labels[batch.supervised]] = REGIMES[regime]
    outcome = outcome_of(subject, loss, logits, [batch])
    for name, value in outcome.sums.items():
        assert torch.isfinite(value), f"sum {name!r} is {float(value)} where labels are {regime}"
    assert torch.isfinite(outcome.gradient).all(), f"the gradient is not finite where labels are {regime}"


@law(drawn=unit_packs(), other=drawn_units_of(), seed=drawn_seeds())
def does_not_leak_between_packed_examples(
    subject: Subject, options: Any, drawn: Drawn, other: DrawnUnit, seed: int
) -> None:
    """Changing one unit does not change the gradient of the others."""
    import torch

    loss = built_loss(subject, options, drawn)
    if couples_batch(loss):
        not_run(COUPLED)
    if not has_default(loss, "loss", "arrange"):
        not_run("the loss arranges units, so that a unit may contain documents of another")
    first, another, *others = lay_out_units(loss, [drawn[0], other, *(drawn[1:] or [other])])
    unchanged, fresh = table_of(pack_examples(others), seed), table_of(pack_examples([another]), seed + 1)
    own = table_of(pack_examples([first]), seed + 2)
    before = outcome_of(subject, loss, torch.cat([own, unchanged]), [pack_examples([first, *others])])
    after = outcome_of(subject, loss, torch.cat([fresh, unchanged]), [pack_examples([another, *others])])
    gradients = before.gradient[len(own) :], after.gradient[len(fresh) :]
    assert_same(*gradients, "gradient of the other documents before and after one unit changed")


@law(drawn=unit_packs(), seed=drawn_seeds())
def invariant_to_order_of_documents(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """Packing the units in reverse gives the same sums, and each unit the same gradient."""
    import torch

    loss = built_loss(subject, options, drawn)
    examples = lay_out_units(loss, drawn)
    batch, reverse = pack_examples(examples), pack_examples(examples[::-1])
    sizes = [len(example.input_ids) for example in examples]
    pieces = table_of(batch, seed).split(sizes)
    forward = outcome_of(subject, loss, torch.cat(pieces), [batch])
    backward = outcome_of(subject, loss, torch.cat(pieces[::-1]), [reverse])
    assert_same(backward.sums, forward.sums, "sums of the units in reverse against those in order")
    returned = torch.cat(backward.gradient.split(sizes[::-1])[::-1])
    assert_same(returned, forward.gradient, "gradient of the units in reverse against that in order")


@law(drawn=unit_packs(), seed=drawn_seeds())
def coefficients_agree_with_the_gradient(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """If `coefficients(batch)` returns [T], it is d (sum of all sums) / d log-probability of each label."""
    loss = built_loss(subject, options, drawn)
    batch = pack_examples(lay_out_units(loss, drawn))
    coefficients = loss.coefficients(batch)
    if coefficients is None:
        not_run("the loss declares no coefficients")
    policy = policy_over(subject, table_of(batch, seed).requires_grad_(True))
    sum(loss(policy, batch).sums.values()).backward()
    gradient = sum(a.grad[batch.supervised] for a in policy.asked if a.grad is not None)
    assert_same(coefficients[batch.supervised], gradient, "coefficients against the gradient by the log-probabilities")


@law(when=lambda r: getattr(r, "reference", None) is not None, drawn=unit_packs(), seed=drawn_seeds())
def matches_its_reference(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """Sums and gradient are those of `record.reference`: `reference(options, policy, batch)` returns a sum by term."""
    module, _, attribute = subject.record.reference.partition(":")  # type: ignore[attr-defined]
    reference = getattr(importlib.import_module(module), attribute)
    loss = built_loss(subject, options, drawn)
    batch = pack_examples(lay_out_units(loss, drawn))
    outcome = outcome_of(subject, loss, table_of(batch, seed), [batch])
    table = table_of(batch, seed).requires_grad_(True)
    expected = reference(options, policy_over(subject, table), batch)
    sum((i + 1) * expected[name] for i, name in enumerate(outcome.sums)).backward()
    assert_same(outcome.sums, {n: s.detach() for n, s in expected.items()}, "sums against those of the reference")
    assert_same(outcome.gradient, table.grad, "gradient against that of the reference")


def live(subject: Subject, options: Any) -> None:
    """Use a loss in every way that a run does."""
    drawn = loss_units.plain_units(subject)
    loss = built_loss(subject, options, drawn)
    batch = pack_examples(lay_out_units(loss, drawn))
    outcome_of(subject, loss, table_of(batch, 0), [batch])
