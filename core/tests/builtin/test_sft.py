"""The loss `sft` and its options: torch's cross-entropy, transformers' smoothing, and the papers' formulas in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.builtin import Sft, luthier_losses
from luthier.builtin.sft import ShapedLoss, SupervisedLoss, build_supervised_loss
from luthier.runs.metrics_file import read_metrics
from luthier.testing import conformance, expect_error
from luthier.testing.policies import TablePolicy
from luthier.testing.worlds import random_batch
from torch.nn.functional import cross_entropy

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 1 << 16)
scales = st.sampled_from((0.01, 1.0, 8.0))
WIDTH = 270  # more than the ids of a random batch
EXAMPLES = [Sft(label_smoothing=0.1, z_loss=1e-3), Sft(dft=True), Sft(dft=True, z_loss=0.1), Sft(z_loss=10.0)]


@conformance(luthier_losses(), examples=EXAMPLES, vary=False)
def test_sft_conforms_with_any_options(check):
    check()


def drawn(seed, scale):
    """A batch of two documents whose tokens have weights, and a table of logits [T, V]."""
    chance = torch.Generator().manual_seed(seed)
    batch = random_batch((5, 3), seed=seed)
    batch.token_weights[batch.supervised] = torch.rand(len(batch.supervised), generator=chance) + 0.5
    return batch, torch.randn(batch.num_tokens, WIDTH, generator=chance, dtype=torch.float64) * scale


def objective(options, batch, logits):
    """The objective, its gradient, and the metrics, each divided by its weight."""
    loss, table = build_supervised_loss(options), logits.clone().requires_grad_(True)
    output, terms = loss(TablePolicy(table), batch), loss.terms(batch)
    total = sum(value / terms[name] for name, value in output.sums.items())
    total.backward()
    return total.detach(), table.grad, {name: float(a) / b for name, (a, b) in output.metrics.items()}


def expect(options, batch, logits, costs_of):
    """The objective and gradient are the weighted mean of `costs_of(rows [S, V], labels [S])`."""
    table, weights = logits.clone().requires_grad_(True), batch.token_weights[batch.supervised].double()
    costs = costs_of(table[batch.previous[batch.supervised]], batch.labels[batch.supervised])
    expected = (costs * weights).sum() / weights.sum()
    expected.backward()
    total, gradient, _ = objective(options, batch, logits)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, table.grad, rtol=1e-9, atol=1e-12)


@few
@given(seed=seeds, scale=scales, share=st.sampled_from((0.0, 0.1, 0.9)), weight=st.sampled_from((0.0, 1e-3)))
def test_smoothing_is_torchs_and_z_loss_the_square_of_the_denominator(seed, scale, share, weight):
    def costs_of(rows, labels):
        smooth = cross_entropy(rows, labels, label_smoothing=share, reduction="none")
        return smooth + weight * rows.exp().sum(-1).log().square()

    expect(Sft(label_smoothing=share, z_loss=weight), *drawn(seed, scale), costs_of)


@few
@given(seed=seeds, scale=scales, share=st.sampled_from((0.1, 0.9)))
def test_smoothing_is_the_factor_of_transformers(seed, scale, share):
    from transformers.trainer_pt_utils import LabelSmoother

    batch, logits = drawn(seed, scale)
    batch.token_weights[batch.supervised] = 1.0
    rows, labels = logits[batch.previous[batch.supervised]], batch.labels[batch.supervised]
    theirs = LabelSmoother(epsilon=share)({"logits": rows[None]}, labels[None])
    # which sums up in float32
    torch.testing.assert_close(objective(Sft(label_smoothing=share), batch, logits)[0], theirs, rtol=1e-6, atol=0)


@few
@given(seed=seeds, scale=scales)
def test_dft_is_the_likelihood_weighted_by_itself(seed, scale):
    def costs_of(rows, labels):
        likelihood = rows.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
        return -likelihood.detach().exp() * likelihood

    expect(Sft(dft=True), *drawn(seed, scale), costs_of)


@few
@given(seed=seeds, scale=scales)
def test_nll_and_accuracy_are_those_of_the_plain_loss_whatever_shapes_it(seed, scale):
    batch, logits = drawn(seed, scale)
    plain, _, known = objective(Sft(), batch, logits)
    for options in EXAMPLES:
        metrics = objective(options, batch, logits)[2]
        assert metrics["nll"] == pytest.approx(float(plain), rel=1e-6)
        assert metrics["accuracy"] == pytest.approx(known["accuracy"], rel=1e-6)


def test_without_options_the_loss_is_the_plain_one_with_known_coefficients():
    assert type(build_supervised_loss(Sft())) is SupervisedLoss
    assert {type(build_supervised_loss(options)) for options in EXAMPLES} == {ShapedLoss}


def test_smoothing_with_dft_is_refused():
    with expect_error("recipe-conflict", "Sft.label_smoothing"):
        Sft(dft=True, label_smoothing=0.1)


def test_an_evaluation_has_the_perplexity_of_the_labels_and_not_of_the_shaped_cost(train, tmp_path, rows):
    settings = {"data": rows, "eval_data": rows[:4], "max_steps": 1, "learning_rate": 1e-9}
    plain = train(**settings, loss="sft", output_dir=tmp_path / "plain").eval_metrics
    for options in EXAMPLES[:2]:
        shaped = train(**settings, loss=options, output_dir=tmp_path / f"{options.dft}").eval_metrics
        assert shaped["eval_perplexity"] == pytest.approx(plain["eval_perplexity"], rel=1e-3)
        assert shaped["eval_loss"] != pytest.approx(plain["eval_loss"], rel=1e-3)


def test_a_run_logs_the_shaped_cost_beside_the_plain_one(train, tmp_path, rows):
    run = train(data=rows, loss={"name": "sft", "label_smoothing": 0.1}, max_steps=1, output_dir=tmp_path / "run")
    line = read_metrics(run.output_path / "metrics.jsonl")[0]
    assert line["loss"] != pytest.approx(line["nll"], rel=1e-3)
    assert 0.0 <= line["accuracy"] <= 1.0
