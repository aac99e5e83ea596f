"""Each objective is torch's or its paper's formula in float64, on drawn logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LossOutput
from luthier.builtin import Sft
from luthier.builtin.sft import build_supervised_loss
from luthier.plugins.completion import add_defaults
from luthier.testing.drawn_units import DrawnUnit, lay_out_units, pack_examples
from luthier.testing.policies import TablePolicy
from luthier.testing.strategies import Document
from luthier_objectives import Kl, Negated, Npo
from luthier_objectives.token_penalties import KlPenalty
from luthier_objectives.unlearning import NegatedLoss, NpoLoss

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 1 << 16)
scales = st.sampled_from((0.01, 1.0, 8.0))
WIDTH = 8


def drawn(seed, scale, forgotten=(True, False, True)):
    """Documents of a prompt token and answers of 1, 2, ... tokens, and a table of logits [T, V]."""
    chance = torch.Generator().manual_seed(seed)
    units = []
    for number, forget in enumerate(forgotten):
        ids = tuple(torch.randint(0, WIDTH, (2 + number,), generator=chance).tolist())
        document = Document(ids=ids, supervised=(False, *[True] * (1 + number)))
        units.append(DrawnUnit(documents={"text": document}, columns={"forget": forget}))
    batch = pack_examples(lay_out_units(add_defaults(NegatedLoss(Negated()), "loss"), units))
    return batch, torch.randn(batch.num_tokens, WIDTH, generator=chance, dtype=torch.float64) * scale


def objective(loss, batch, logits):
    """The sum of all terms over their weights, and the gradient of the table."""
    loss, table = add_defaults(loss, "loss"), logits.clone().requires_grad_(True)
    output, terms = loss(TablePolicy(table), batch), loss.terms(batch)
    total = sum(value / terms[name] for name, value in output.sums.items() if terms[name])
    total.backward()
    return total.detach(), table.grad


def expect(loss, batch, logits, formula):
    """The loss has the value and gradient of `formula(rows [S, V], labels [S])`."""
    table = logits.clone().requires_grad_(True)
    expected = formula(table[batch.previous[batch.supervised]], batch.labels[batch.supervised])
    expected.backward()
    found = objective(loss, batch, logits)
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1], table.grad, rtol=1e-9, atol=1e-12)


class Pulled:
    """The loss `sft` with the penalty `kl`, as a step adds them up."""

    data = "tokens"

    def __init__(self, options, penalty):
        self.loss, self.penalty = build_supervised_loss(options), KlPenalty(penalty)

    def terms(self, batch):
        weights = self.loss.terms(batch)
        return {**weights, "penalty/kl": weights["sft"]}

    def __call__(self, policy, batch):
        divergence = (self.penalty.measure_tokens(policy, batch) * batch.token_weights).sum()
        return LossOutput(sums={**self.loss(policy, batch).sums, "penalty/kl": divergence})


@few
@given(seed=seeds, scale=scales, weight=st.sampled_from((0.1, 2.0)), share=st.sampled_from((0.0, 0.2)),
       divergence=st.sampled_from(("reverse_kl", "forward_kl")))  # fmt: skip
def test_sft_with_the_penalty_is_cross_entropy_and_the_divergence_of_all_tokens(seed, scale, weight, share, divergence):
    batch, logits = drawn(seed, scale)
    sources = batch.previous[batch.supervised]

    def formula(rows, labels):
        own, other = rows.log_softmax(-1), logits.roll(1, -1)[sources].log_softmax(-1)
        target, guess = (own, other) if divergence == "reverse_kl" else (other, own)  # torch's order is the reverse
        pull = torch.nn.functional.kl_div(guess, target, log_target=True, reduction="batchmean")
        return torch.nn.functional.cross_entropy(rows, labels, label_smoothing=share) + weight * pull

    pulled = Pulled(Sft(label_smoothing=share), Kl(weight=weight, divergence=divergence))
    expect(pulled, batch, logits, formula)


def parts(batch, rows, labels):
    """-log p of each token, and which row it is of."""
    costs = torch.nn.functional.cross_entropy(rows, labels, reduction="none")
    return costs, batch.document_ids()[batch.supervised]


@few
@given(
    seed=seeds, scale=st.sampled_from((0.01, 1.0)), beta=st.sampled_from((0.1, 1.0)), keep=st.sampled_from((0.0, 2.0))
)
def test_npo_is_equation_three_of_its_paper(seed, scale, beta, keep):
    batch, logits = drawn(seed, scale)

    def formula(rows, labels):
        own, owner = parts(batch, rows, labels)
        other, _ = parts(batch, logits.roll(1, -1)[batch.previous[batch.supervised]], labels)
        ratios = [(other - own)[owner == row].sum().exp() for row in (0, 2)]
        forget = sum(2 / beta * (1 + ratio**beta).log() for ratio in ratios) / 2
        return forget + keep * own[owner == 1].mean()

    expect(NpoLoss(Npo(beta=beta, retain_weight=keep)), batch, logits, formula)


@few
@given(seed=seeds, scale=scales, weight=st.sampled_from((0.1, 1.0)))
def test_the_negated_loss_raises_what_the_retained_rows_lower(seed, scale, weight):
    batch, logits = drawn(seed, scale)

    def formula(rows, labels):
        costs, owner = parts(batch, rows, labels)
        return costs[owner == 1].mean() - weight * costs[owner != 1].mean()

    expect(NegatedLoss(Negated(forget_weight=weight)), batch, logits, formula)


def test_npo_begins_at_its_constant_and_forgets_without_end():
    batch, logits = drawn(0, 1.0, forgotten=(True,))
    loss = add_defaults(NpoLoss(Npo(beta=0.5)), "loss")

    class Same(TablePolicy):
        def reference(self):
            return TablePolicy(self.logits.detach())

    start = loss(Same(logits), batch).sums["forget"]
    assert float(start) == pytest.approx(2 / 0.5 * math.log(2))
