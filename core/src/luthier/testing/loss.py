"""Checks of losses: sums that add up over any split, over supervised tokens only, with gradients that stay finite.

Losses are run on a `TablePolicy`, so that every value is exact and of any size. A loss whose data is not tokens gets
only the checks of every part.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs
from hypothesis import strategies as st

from luthier.plugins.records import Record
from luthier.plugins.values import LossOutput
from luthier.testing.checks import Subject, law
from luthier.testing.strategies import Document, documents, pack, packs, seeds

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY: Final = 7
CLOSE: Final[dict[str, Any]] = {
    "rtol": 1e-5,
    "atol": 1e-6,
}  # float32 is allowed; a wrong sum is far off
REGIMES: Final = {"usual": 0.0, "certain": 17.3, "sure": 1e4, "impossible": -1e4}  # a label's logit above the others


def _on_tokens(record: Record) -> bool:
    return getattr(record, "data", "tokens") == "tokens"


@attrs.frozen(kw_only=True, eq=False)
class Outcome:
    """A loss over batches: its sums and denominators, and [T, V] the gradient of sum 1 + 2 * sum 2 + 3 * sum 3 ...

    `metrics` has the sum and the count of each of its metrics.
    """

    sums: dict[str, Tensor]
    terms: dict[str, float]
    metrics: dict[str, tuple[float, float]]
    gradient: Tensor


def outcome(loss: Any, logits: Tensor, batches: Sequence[Any]) -> Outcome:
    """The loss over micro-batches whose tokens are the rows of `logits`, one after the other."""
    from luthier.testing.policies import TablePolicy

    table = logits.detach().clone().requires_grad_(True)
    tables = table.split([b.num_tokens for b in batches])
    policies = [TablePolicy(t) for t in tables]
    outputs = _outputs(loss, policies, batches)
    sums = _added([o.sums for o in outputs])
    total = sum((i + 1) * value for i, value in enumerate(sums.values()))
    if getattr(total, "requires_grad", False):
        total.backward()  # type: ignore[union-attr]
    gradient = table.grad if table.grad is not None else table.detach() * 0
    return Outcome(
        sums={n: s.detach() for n, s in sums.items()},
        terms=_added([loss.terms(b) for b in batches]),
        metrics=_metrics(outputs),
        gradient=gradient,
    )


def _outputs(loss: Any, policies: Sequence[Any], batches: Sequence[Any]) -> list[LossOutput]:
    """One for each micro-batch; one for all together where the loss couples them."""
    pairs = zip(policies, batches, strict=True)
    if not _couples(loss):
        return [loss(policy, batch) for policy, batch in pairs]
    import torch

    scored = [loss.scores(policy, batch) for policy, batch in pairs]
    fixed = {name: torch.cat([own[name].detach() for _, own in scored]) for name in scored[0][1]}
    return [loss.combine(torch.cat([scores for scores, _ in scored]), fixed)]


def _added(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for mapping in mappings:
        for name, value in mapping.items():
            total[name] = total[name] + value if name in total else value
    return total


def _metrics(outputs: Sequence[LossOutput]) -> dict[str, tuple[float, float]]:
    sums = _added([{name: float(pair[0]) for name, pair in o.metrics.items()} for o in outputs])
    counts = _added([{name: float(pair[1]) for name, pair in o.metrics.items()} for o in outputs])
    return {name: (sums[name], counts[name]) for name in sums}


def _couples(loss: Any) -> bool:
    return getattr(loss, "couples", "nothing") == "batch"


def _table(batch: Any, seed: int) -> Tensor:
    from luthier.testing.policies import random_table

    return random_table(batch.num_tokens, VOCABULARY, seed)


def _same(found: Any, expected: Any, what: str) -> None:
    """Numbers, tensors, or mappings of them are close."""
    import torch

    __tracebackhide__ = True
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), f"{what}: terms {sorted(found)} became {sorted(expected)}"
        for name in expected:
            _same(found[name], expected[name], f"{what}, term {name!r}")
        return
    one, two = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    furthest = float((one - two).abs().max()) if one.numel() else 0.0
    shown = f"{float(one):.6g} and {float(two):.6g}" if one.numel() == 1 else f"up to {furthest:.3g} apart"
    assert torch.allclose(one, two, **CLOSE), f"{what}: {shown}"


@law(when=_on_tokens, first=packs(), second=packs(), seed=seeds())
def adds_up_over_micro_batches(
    subject: Subject, options: Any, first: list[Document], second: list[Document], seed: int
) -> None:
    """Sums, denominators, metrics and gradients of two micro-batches are those of both packed into one."""
    loss = subject.build(options)
    parts, whole = [pack(first), pack(second)], pack([*first, *second])
    logits = _table(whole, seed)
    apart, together = outcome(loss, logits, parts), outcome(loss, logits, [whole])
    _same(apart.sums, together.sums, "sums of two micro-batches against those of one with all documents")
    _same(apart.terms, together.terms, "denominators of two micro-batches against those of one")
    _same(apart.metrics, together.metrics, "sum and count of metrics over two micro-batches against those over one")
    _same(apart.gradient, together.gradient, "gradients of two micro-batches against those of one")


@law(when=_on_tokens, drawn=packs(), seed=seeds())
def gives_sums_not_means(subject: Subject, options: Any, drawn: list[Document], seed: int) -> None:
    """The same documents twice in a batch give twice every sum and denominator; each sum is a scalar with its own."""
    import torch

    loss = subject.build(options)
    if _couples(loss):
        return
    logits = _table(pack(drawn), seed)
    once = outcome(loss, logits, [pack(drawn)])
    twice = outcome(loss, torch.cat([logits, logits]), [pack([*drawn, *drawn])])
    assert once.sums.keys() == once.terms.keys(), f"sums {sorted(once.sums)}, but denominators {sorted(once.terms)}"
    for name, value in once.sums.items():
        assert value.dim() == 0, f"sum {name!r} has the shape {tuple(value.shape)}, not that of a scalar"
    _same(twice.sums, {n: 2 * s for n, s in once.sums.items()}, "sums of doubled documents against twice the sums")
    _same(twice.terms, {n: 2 * t for n, t in once.terms.items()}, "denominators of doubled documents")


@law(when=_on_tokens, drawn=packs(), extra=documents(), seed=seeds())
def ignores_unlabelled_tokens(
    subject: Subject, options: Any, drawn: list[Document], extra: Document, seed: int
) -> None:
    """Tokens without label add nothing to sums, denominators or gradient: 0 over 0."""
    loss = subject.build(options)
    silent = attrs.evolve(extra, supervised=(False,) * len(extra.ids))
    batch, longer, nothing = pack(drawn), pack([*drawn, silent]), pack([silent])
    logits = _table(longer, seed)
    without, beside = outcome(loss, logits[: batch.num_tokens], [batch]), outcome(loss, logits, [longer])
    _same(beside.sums, without.sums, "sums with a document that has no labels against those without it")
    _same(beside.terms, without.terms, "denominators with a document that has no labels against those without it")
    unused = [t for t in range(longer.num_tokens) if t not in longer.previous[longer.supervised].tolist()]
    _same(beside.gradient[unused], beside.gradient[unused] * 0, "gradient where no label is predicted against 0")
    if not _couples(loss):
        alone = outcome(loss, logits[batch.num_tokens :], [nothing])
        _same(alone.sums, {n: 0.0 for n in alone.sums}, "sums of a batch without labels against 0")
        _same(alone.terms, {n: 0.0 for n in alone.terms}, "denominators of a batch without labels against 0")


@law(when=_on_tokens, drawn=packs(weights=(1.0,)), seed=seeds())
def counts_an_example_by_its_weight(subject: Subject, options: Any, drawn: list[Document], seed: int) -> None:
    """A document of weight 2 counts as the document twice (`batch.token_weights`)."""
    import torch

    loss = subject.build(options)
    if _couples(loss):
        return
    logits = _table(pack(drawn), seed)
    heavy = [attrs.evolve(drawn[0], weight=2.0), *drawn[1:]]
    length = len(drawn[0].ids)
    weighted = outcome(loss, logits, [pack(heavy)])
    repeated = outcome(loss, torch.cat([logits[:length], logits]), [pack([drawn[0], *drawn])])
    _same(weighted.sums, repeated.sums, "sums with a document of weight 2 against those with it twice")
    _same(weighted.terms, repeated.terms, "denominators with a document of weight 2 against those with it twice")


@law(when=_on_tokens, drawn=packs(), seed=seeds(), regime=st.sampled_from(tuple(REGIMES)))
def gradient_is_finite(subject: Subject, options: Any, drawn: list[Document], seed: int, regime: str) -> None:
    """Sums and gradients in float32 are finite, also where a label is certain or next to impossible."""
    import torch

    batch = pack(drawn)
    logits = _table(batch, seed).float()
    if regime != "usual":  # log-probabilities of -2e-7, 0 and -1e4
        logits = logits * 0
        logits[batch.previous[batch.supervised], batch.labels[batch.supervised]] = REGIMES[regime]
    found = outcome(subject.build(options), logits, [batch])
    for name, value in found.sums.items():
        assert torch.isfinite(value), f"sum {name!r} is {float(value)} where labels are {regime}"
    assert torch.isfinite(found.gradient).all(), f"the gradient is not finite where labels are {regime}"


@law(when=_on_tokens, drawn=packs(), other=documents(), seed=seeds())
def does_not_leak_between_packed_examples(
    subject: Subject, options: Any, drawn: list[Document], other: Document, seed: int
) -> None:
    """Changing one document leaves the gradient of the others alone."""
    import torch

    loss = subject.build(options)
    if _couples(loss):
        return
    length = len(drawn[0].ids)
    rest = pack(drawn[1:]) if drawn[1:] else pack([other])
    others = drawn[1:] or [other]
    kept, fresh = _table(rest, seed), _table(pack([other]), seed + 1)
    before = outcome(loss, torch.cat([_table(pack(drawn[:1]), seed + 2), kept]), [pack([drawn[0], *others])])
    after = outcome(loss, torch.cat([fresh, kept]), [pack([other, *others])])
    gradients = before.gradient[length:], after.gradient[len(other.ids) :]
    _same(*gradients, "gradient of the other documents before and after one document changed")


@law(when=_on_tokens, drawn=packs(), seed=seeds())
def invariant_to_order_of_documents(subject: Subject, options: Any, drawn: list[Document], seed: int) -> None:
    """Packing the documents in reverse gives the same sums, and each document the same gradient."""
    import torch

    loss = subject.build(options)
    batch, reverse = pack(drawn), pack(drawn[::-1])
    pieces = _table(batch, seed).split(batch.lengths.tolist())
    forward, backward = outcome(loss, torch.cat(pieces), [batch]), outcome(loss, torch.cat(pieces[::-1]), [reverse])
    _same(backward.sums, forward.sums, "sums of the documents in reverse against those in order")
    returned = torch.cat(backward.gradient.split(reverse.lengths.tolist())[::-1])
    _same(returned, forward.gradient, "gradient of the documents in reverse against that in order")


@law(when=_on_tokens, drawn=packs(), seed=seeds())
def coefficients_agree_with_the_gradient(subject: Subject, options: Any, drawn: list[Document], seed: int) -> None:
    """Where `coefficients(batch)` gives [T], it is d (sum of all sums) / d log-probability of each label."""
    from luthier.testing.policies import TablePolicy

    loss, batch = subject.build(options), pack(drawn)
    told = loss.coefficients(batch) if callable(getattr(loss, "coefficients", None)) else None
    if told is None:
        return
    policy = TablePolicy(_table(batch, seed).requires_grad_(True))
    sum(loss(policy, batch).sums.values()).backward()  # type: ignore[union-attr]
    found = sum(a.grad[batch.supervised] for a in policy.asked if a.grad is not None)
    _same(told[batch.supervised], found, "coefficients against the gradient with respect to the log-probabilities")


@law(when=lambda r: _on_tokens(r) and getattr(r, "reference", None) is not None, drawn=packs(), seed=seeds())
def matches_its_reference(subject: Subject, options: Any, drawn: list[Document], seed: int) -> None:
    """Sums and gradient are those of `record.reference`: `reference(options, policy, batch)` gives a sum by term."""
    from luthier.testing.policies import TablePolicy

    module, _, attribute = subject.record.reference.partition(":")  # type: ignore[attr-defined]
    reference = getattr(importlib.import_module(module), attribute)
    batch = pack(drawn)
    found = outcome(subject.build(options), _table(batch, seed), [batch])
    table = _table(batch, seed).requires_grad_(True)
    expected = reference(options, TablePolicy(table), batch)
    sum((i + 1) * expected[name] for i, name in enumerate(found.sums)).backward()  # type: ignore[union-attr]
    _same(found.sums, {n: s.detach() for n, s in expected.items()}, "sums against those of the reference")
    _same(found.gradient, table.grad, "gradient against that of the reference")


def live(subject: Subject, options: Any) -> None:
    """All that a run asks of a loss."""
    loss = subject.build(options)
    batch = pack([Document(ids=(1, 2, 3, 4), supervised=(False, True, True, True))] * 2)
    if _on_tokens(subject.record):
        outcome(loss, _table(batch, 0), [batch])
