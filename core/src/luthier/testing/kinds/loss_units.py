"""Checks of losses on whole units: idle batches, names, declarations, state, preferences, and a real model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from luthier.plugins.completion import has_default
from luthier.testing.drawn_units import (
    NAMES,
    DrawnUnit,
    even_units,
    idle_batch,
    lay_out_units,
    pack_examples,
    unit_packs,
)
from luthier.testing.kinds.loss_outcome import (
    CLOSE,
    assert_same,
    built_loss,
    couples_batch,
    outcome_of,
    outputs_of,
    policy_over,
    table_of,
)
from luthier.testing.laws import Subject, law, not_run
from luthier.testing.strategies import Document, drawn_seeds

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data.examples import TokenExample

    Drawn = list[DrawnUnit]


@law(drawn=unit_packs(), seed=drawn_seeds())
def takes_idle_batches(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """A batch without units gives finite sums (or no scores) that depend on the policy, because other ranks wait for
    it.
    """
    import torch

    loss, batch = built_loss(subject, options, drawn), idle_batch(drawn)
    policy = policy_over(subject, table_of(batch, seed).requires_grad_(True))
    if couples_batch(loss):
        scores, fixed = loss.scores(policy, batch)
        rows = {"scores": len(scores), **{name: len(value) for name, value in fixed.items()}}
        assert not any(rows.values()), f"an idle batch has no units, but rows of {rows}"
        sums = [scores.sum()]
    else:
        sums = list(loss(policy, batch).sums.values())
    assert all(torch.isfinite(value) for value in sums), "a sum of an idle batch is not finite"
    assert any(v.requires_grad for v in sums), "nothing of an idle batch depends on the policy; add 0 * its numbers"


@law(drawn=unit_packs(), seed=drawn_seeds())
def terms_name_every_sum(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """`terms(batch)` has the names of the sums, and each weight is a number of at least 0."""
    loss = built_loss(subject, options, drawn)
    batch = pack_examples(lay_out_units(loss, drawn))
    outcome = outcome_of(subject, loss, table_of(batch, seed), [batch])
    assert outcome.sums.keys() == outcome.terms.keys(), (
        f"sums {sorted(outcome.sums)}, but denominators {sorted(outcome.terms)}"
    )
    wrong = {name: weight for name, weight in outcome.terms.items() if not float(weight) >= 0}
    assert not wrong, f"denominators that are not weights: {wrong}"


@law(drawn=unit_packs(), seed=drawn_seeds())
def metrics_have_names_of_their_own(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """No metric has the name of one of the run's own (loss, grad_norm, samples, ...)."""
    loss = built_loss(subject, options, drawn)
    batch = pack_examples(lay_out_units(loss, drawn))
    outcome_of(subject, loss, table_of(batch, seed), [batch])  # this function checks the names


@law(drawn=unit_packs())
def arrange_is_a_pure_function(subject: Subject, options: Any, drawn: Drawn) -> None:
    """The same units are arranged in the same way each time, and none is added, dropped or moved."""
    loss = subject.build(options)
    if has_default(loss, "loss", "arrange"):
        not_run("the loss leaves units as they are")
    once, again = lay_out_units(loss, drawn), lay_out_units(loss, drawn)
    assert len(once) == len(drawn), f"{len(drawn)} units became {len(once)}"
    for one, two in zip(once, again, strict=True):
        same = one.names == two.names and one.input_ids.tolist() == two.input_ids.tolist()
        assert same, f"the same units were arranged differently the second time: {one.names} and {two.names}"


@law(5, drawn=unit_packs(), seed=drawn_seeds())
def declares_reference_and_teacher(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """The loss uses `policy.reference()` and `policy.teacher()` only if the record's `needs` names them."""
    loss = built_loss(subject, options, drawn)
    batch = pack_examples(lay_out_units(loss, drawn))
    outcome_of(subject, loss, table_of(batch, seed), [batch])


@law(drawn=unit_packs(), seed=drawn_seeds())
def reads_of_the_teacher_what_it_says(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """With `teacher_reads = (count, temperature)`, a teacher of which no more is known gives the same sums."""
    from luthier.step.reference.cached_teacher import keep_top, spread_top
    from luthier.testing.policies import TablePolicy

    loss = built_loss(subject, options, drawn)
    if loss.teacher_reads is None:
        not_run("it may read all that a teacher says")
    batch = pack_examples(lay_out_units(loss, drawn))
    table = table_of(batch, seed)
    count, temperature = min(loss.teacher_reads[0], table.shape[-1]), loss.teacher_reads[1]

    class Little(TablePolicy):
        def teacher(self) -> TablePolicy:
            kept = keep_top(super().teacher().logits, count, temperature)
            return TablePolicy(spread_top(kept, count, temperature, table.shape[-1]))

    outputs = [loss(policy(table), batch) for policy in (TablePolicy, Little)]
    whole, little = ({name: value.detach() for name, value in output.sums.items()} for output in outputs)
    assert_same(little, whole, "sums with what teacher_reads names of the teacher against those with all of it")


@law(5, drawn=unit_packs(), seed=drawn_seeds())
def state_survives_a_checkpoint(subject: Subject, options: Any, drawn: Drawn, seed: int) -> None:
    """A loss that has begun, and one that only loads the first one's state, give the same sums."""
    from luthier.state_tree import load_state, save_state

    first = built_loss(subject, options, drawn)
    batch = pack_examples(lay_out_units(first, drawn))
    outcome_of(subject, first, table_of(batch, seed), [batch])
    second = subject.build(options)
    with tempfile.TemporaryDirectory() as folder:
        save_state({"loss": first.state()}, Path(folder))
        second.load_state(load_state(Path(folder))["loss"])
    logits = table_of(batch, seed + 1)
    one, two = (outcome_of(subject, loss, logits, [batch]) for loss in (first, second))
    assert_same(two.sums, one.sums, "sums after a resume against those without")
    assert_same(two.gradient, one.gradient, "gradient after a resume against that without")


@law(when=lambda r: getattr(r, "data", "") in ("preference", "unpaired"), drawn=even_units)
def prefers_what_the_row_prefers(subject: Subject, options: Any, drawn: Drawn) -> None:
    """If all answers are equally likely, the objective falls as preferred answers become likelier than the others.

    Preferred answers are chosen ones, and those with the label true.
    """
    import torch

    loss = built_loss(subject, options, drawn)
    batch = pack_examples(lay_out_units(loss, drawn))
    outcome = outcome_of(subject, loss, torch.zeros_like(table_of(batch, 0)), [batch])
    towards = torch.zeros_like(outcome.gradient)
    document = batch.document_ids()[batch.supervised]
    signs = torch.zeros(batch.num_documents, dtype=towards.dtype)
    for name, sign in (("chosen", 1.0), ("rejected", -1.0)):
        signs[batch.documents(name)[batch.documents(name) >= 0]] = sign
    if "label" in batch.columns:
        signs[batch.documents("text")] = torch.where(batch.columns["label"], 1.0, -1.0).to(signs)
    towards[batch.previous[batch.supervised], batch.labels[batch.supervised]] = signs[document]
    slope = float((outcome.gradient * towards).sum())
    assert slope < 0, f"the objective changes by {slope:.3g} as preferred answers become likelier: it must fall"


@law(3, default_only=True, drawn=unit_packs(weights=(1.0,)))
def agrees_on_a_model(subject: Subject, options: Any, drawn: Drawn) -> None:
    """On a real model, packed units and separate units give the same sums and gradients."""
    import torch

    from luthier.testing.worlds import tiny_model

    loss = built_loss(subject, options, drawn)
    units = lay_out_units(loss, [*drawn, *plain_units(subject)])
    model = _exact(tiny_model())
    close = CLOSE if model.dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    packed, apart = (_on_model(subject, loss, model, parts) for parts in ([units], [[unit] for unit in units]))
    assert_same(apart[0], packed[0], "sums of units apart against those packed, on a model", close)
    assert_same(apart[1], packed[1], "gradients of units apart against those packed, on a model", close)


def _exact(model: Any) -> Any:
    """Return the model without dropout, in float64; with experts in its dtype, as torch groups no float64 products."""
    from luthier.model import attention

    model = model if hasattr(model.config.get_text_config(), "num_experts_per_tok") else model.double()
    attention.install_attention(model)
    return model.eval()


def _on_model(
    subject: Subject, loss: Any, model: Any, parts: Sequence[Sequence[TokenExample]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sums and the gradients of the model's weights."""
    from luthier.model.policy import ModelPolicy

    model.zero_grad(set_to_none=True)
    batches = [pack_examples(examples) for examples in parts]
    policies = [ModelPolicy(model) for _ in batches]
    for policy in policies:
        policy.others |= {name: _other() for name in subject.record.needs & {"reference", "teacher"}}
    outputs = outputs_of(loss, policies, batches)
    names = outputs[0].sums
    sums = {name: cast("Tensor", sum(o.sums[name] for o in outputs)) for name in names}
    cast("Tensor", sum(sums.values())).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in sums.items()}, gradients


def _other() -> Any:
    """Return a frozen policy over another model."""
    from contextlib import nullcontext

    from luthier.model.policy import ModelPolicy
    from luthier.testing.worlds import tiny_model

    return ModelPolicy(_exact(tiny_model(seed=1)), frozen=nullcontext)


def plain_units(subject: Subject) -> Drawn:
    """Return two units as the record declares them, with both values of each truth value."""
    record: Any = subject.record
    document = Document(ids=(1, 2, 3, 4), supervised=(False, True, True, True))
    names = dict.fromkeys((*NAMES[record.data], *record.documents))
    kinds = {"label": "bool", **record.columns} if record.data == "unpaired" else dict(record.columns)
    values = {"bool": (True, False), "int": (1, 2), "float": (0.5, 1.0)}
    return [
        DrawnUnit(documents=dict.fromkeys(names, document), columns={n: values[k][i] for n, k in kinds.items()})
        for i in range(2)
    ]
