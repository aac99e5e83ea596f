"""Checks of metrics: sums and counts add up for every division of the cases, and nothing is kept between calls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import attrs

from luthier.plugins.completion import has_default
from luthier.plugins.contracts.values import TokenStatistics
from luthier.testing.laws import Subject, law, not_run

if TYPE_CHECKING:
    pass

PAIRS: Final = (
    ("12", "12"),
    ("12", "13"),
    ("", "13"),
    ("the cat sat", "the cat sat down"),
    ("Ja, genau: ½ ≠ 0.5", "ja"),
    ("yes", ""),
)
VOCABULARY: Final = 11
TOKENS: Final = 12


@law(0)
def gives_a_sum_and_a_count(subject: Subject) -> None:
    """It returns a finite sum and a count of 0 or more, and counts something over all cases of the kit.

    A metric with its own `conclude` may return other statistics, always the same number of them, that give a number.
    """
    for metric in _metrics(subject):
        scores = [_score(subject, metric, case) for case in _cases(subject)]
        assert all(math.isfinite(number) for numbers in scores for number in numbers), f"not finite: {scores}"
        assert len({len(numbers) for numbers in scores}) == 1, f"not equally many numbers: {scores}"
        totals = [sum(column) for column in zip(*scores, strict=True)]
        if has_default(metric, "metric", "conclude"):
            assert len(totals) == 2, f"no sum and count: {scores[0]}"
            assert all(numbers[1] >= 0 for numbers in scores), f"a count below 0: {scores}"
            assert totals[1] > 0, "nothing is ever counted"
        assert math.isfinite(metric.conclude(totals)), f"no number from {totals}"


@law(0)
def keeps_nothing_between_calls(subject: Subject) -> None:
    """The same case gives the same numbers whatever was scored before, because ranks and batches divide the cases."""
    for metric, other in zip(_metrics(subject), _metrics(subject), strict=True):
        first = [_score(subject, metric, case) for case in _cases(subject)]
        again = [_score(subject, other, case) for case in reversed(list(_cases(subject)))][::-1]
        twice = [_score(subject, other, case) for case in _cases(subject)]
        assert first == again == twice, "the numbers of a case depend on what was scored before"


@law(0, when=lambda record: getattr(record, "over", "") == "tokens")
def adds_up_over_tokens(subject: Subject) -> None:
    """The sum and count of some tokens are the totals of their parts: a mean is not a sum."""
    for metric in _metrics(subject):
        for case in _cases(subject):
            total, count = _score(subject, metric, case)
            parts = [_score(subject, metric, _cut(case, slice(a, a + 1))) for a in range(len(case.labels))]
            sums = [sum(part[i] for part in parts) for i in (0, 1)]
            close = all(
                math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4) for a, b in zip(sums, (total, count), strict=True)
            )
            assert close, f"{(total, count)} for all tokens, {tuple(sums)} for one after the other"


def live(subject: Subject, options: Any) -> None:
    """Score every case with these options."""
    metric = subject.build(options)
    for case in _cases(subject):
        _score(subject, metric, case)


def _metrics(subject: Subject) -> list[Any]:
    """Return the part with its defaults, if every option has one, and with each of the author's examples."""
    cls = subject.options_class
    required = any(field.init and field.default is attrs.NOTHING for field in attrs.fields(cls))
    if required and not subject.own_examples:
        not_run("an option has no default: give examples")
    return [subject.build(options) for options in (*(() if required else (cls(),)), *subject.own_examples)]


def _score(subject: Subject, metric: Any, case: Any) -> tuple[float, ...]:
    if subject.record.over == "answers":  # type: ignore[attr-defined]
        prediction, reference = case
        return tuple(map(float, metric.score_answers([prediction] * metric.num_answers, reference)))
    total, count = metric.score_tokens(case)
    return float(total), float(count)


def _cases(subject: Subject) -> Iterator[Any]:
    import torch

    if subject.record.over == "answers":  # type: ignore[attr-defined]
        yield from PAIRS
        return
    random = torch.Generator().manual_seed(0)
    for weighted in (False, True):
        logits = torch.randn(TOKENS, VOCABULARY, generator=random).log_softmax(-1)
        labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=random)
        wants = subject.record.wants  # type: ignore[attr-defined]
        yield TokenStatistics(
            labels=labels,
            logprobs=logits.gather(-1, labels[:, None]).squeeze(-1),
            weights=torch.rand(TOKENS, generator=random) if weighted else torch.ones(TOKENS),
            entropy=-(logits.exp() * logits).sum(-1) if "entropy" in wants else None,
            top1=(logits.argmax(-1) == labels).float() if "top1" in wants else None,
        )


def _cut(case: TokenStatistics, part: slice) -> TokenStatistics:
    return TokenStatistics(
        labels=case.labels[part],
        logprobs=case.logprobs[part],
        weights=case.weights[part],
        entropy=None if case.entropy is None else case.entropy[part],
        top1=None if case.top1 is None else case.top1[part],
    )
