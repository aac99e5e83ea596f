"""The results of a loss over a table of logits, in a form in which two ways to the same numbers can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from luthier.plugins.completion import has_default
from luthier.plugins.contracts.values import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.testing.drawn_units import DrawnUnit
    from luthier.testing.laws import Subject

VOCABULARY: Final = 7
CLOSE: Final[Mapping[str, float]] = {"rtol": 1e-5, "atol": 1e-6}  # float32 is allowed, and a wrong sum is far outside


@attrs.frozen(kw_only=True, eq=False)
class Outcome:
    """A loss's result over batches: its sums, denominators, and the gradient [T, V] of sum 1 + 2 * sum 2 + 3 * sum 3
    ...

    `metrics` has the sum and the count of each of its metrics. `sources` are the rows for which the loss asked
    log-probabilities of labels of its own.
    """

    sums: dict[str, Tensor]
    terms: dict[str, float]
    metrics: dict[str, tuple[float, float]]
    gradient: Tensor
    sources: set[int]


def built_loss(subject: Subject, options: Any, drawn: Sequence[DrawnUnit]) -> Any:
    """Return the loss, begun as at the start of a run whose data are these units."""
    loss = subject.build(options)
    if not has_default(loss, "loss", "begin"):
        loss.begin(begin_context(loss, drawn))
    return loss


def begin_context(loss: Any, drawn: Sequence[DrawnUnit]) -> Any:
    """Return a context whose batches are these units, each time with the same policy over a table."""
    from luthier.testing.contexts import context
    from luthier.testing.drawn_units import lay_out_units, pack_examples
    from luthier.testing.policies import TablePolicy
    from luthier.testing.worlds import tiny_model

    def over(batches: Any, function: Any) -> list[Any]:
        import torch

        with torch.no_grad():
            return [function(TablePolicy(table_of(batch, 1)), batch) for batch in batches]

    batches = [pack_examples([example]) for example in lay_out_units(loss, drawn)]
    return attrs.evolve(context(tiny_model()), batches=lambda count: batches[:count], over=over)


def outcome_of(subject: Subject, loss: Any, logits: Tensor, batches: Sequence[Any]) -> Outcome:
    """Return the loss over micro-batches whose tokens are the rows of `logits`, one after the other."""
    table = logits.detach().clone().requires_grad_(True)
    sizes = [b.num_tokens for b in batches]
    policies = [policy_over(subject, part) for part in table.split(sizes)]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    outputs = outputs_of(loss, policies, batches)
    sums = _added([o.sums for o in outputs])
    total = sum((i + 1) * value for i, value in enumerate(sums.values()))
    if getattr(total, "requires_grad", False):
        total.backward()
    gradient = table.grad if table.grad is not None else table.detach() * 0
    return Outcome(
        sums={n: s.detach() for n, s in sums.items()},
        terms=_added([loss.terms(b) for b in batches]),
        metrics=_metrics(outputs),
        gradient=gradient,
        sources={row + at for policy, at in zip(policies, starts, strict=True) for row in policy.sources},
    )


def policy_over(subject: Subject, logits: Tensor) -> Any:
    """Return a policy with a reference and a teacher, if the record says that the loss needs them."""
    from luthier.testing.policies import TablePolicy

    return TablePolicy(logits, others=subject.record.needs & {"reference", "teacher"})


def outputs_of(loss: Any, policies: Sequence[Any], batches: Sequence[Any]) -> list[LossOutput]:
    """Return the output for each micro-batch; one output for all if the loss couples them."""
    from luthier.step.losses.loss_output import check_output, check_scores

    pairs = zip(policies, batches, strict=True)
    if not couples_batch(loss):
        return [check_output(loss(policy, batch), "the loss") for policy, batch in pairs]
    import torch

    scored = [check_scores(loss.scores(policy, batch), batch) for policy, batch in pairs]
    fixed = {name: torch.cat([own[name] for _, own in scored]) for name in scored[0][1]}
    return [check_output(loss.combine(torch.cat([scores for scores, _ in scored]), fixed), "combine")]


def couples_batch(loss: Any) -> bool:
    return bool(loss.couples == "batch")


def table_of(batch: Any, seed: int) -> Tensor:
    """Return logits [T, V] of a usual size."""
    from luthier.testing.policies import random_table

    return random_table(batch.num_tokens, VOCABULARY, seed)


def assert_same(actual: Any, expected: Any, what: str, close: Mapping[str, float] = CLOSE) -> None:
    """Raise `AssertionError` unless numbers, tensors, or mappings of them are close."""
    import torch

    __tracebackhide__ = True
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), f"{what}: terms {sorted(actual)} became {sorted(expected)}"
        for name in expected:
            assert_same(actual[name], expected[name], f"{what}, term {name!r}", close)
        return
    one, two = torch.as_tensor(actual, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    furthest = float((one - two).abs().max()) if one.numel() else 0.0
    shown = f"{float(one):.6g} and {float(two):.6g}" if one.numel() == 1 else f"up to {furthest:.3g} apart"
    assert torch.allclose(one, two, rtol=close["rtol"], atol=close["atol"]), f"{what}: {shown}"


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
