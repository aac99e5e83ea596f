"""The divergence from the reference as a penalty of any loss, also of one that couples the batch."""

import json

import pytest
import torch
from luthier import LossOutput
from luthier.testing import expect_error

PULL = [{"name": "kl", "weight": 0.5}]


def logged(run):
    return [json.loads(line) for line in (run.output_path / "metrics.jsonl").read_text().splitlines()]


class Anchored:
    """Cross-entropy and half of the divergence from the reference as one loss of its own."""

    data = "tokens"
    needs = ("reference",)

    def terms(self, batch):
        return {"anchored": float(batch.token_weights[batch.supervised].sum())}

    def __call__(self, policy, batch):
        costs = policy.map_logits(batch, self.measure, other=policy.reference()) * batch.token_weights[:, None]
        nll, divergence = costs.sum(0)
        metrics = {name: (value.detach(), self.terms(batch)["anchored"]) for name, value in
                   (("nll", nll), ("kl", divergence))}  # fmt: skip
        return LossOutput(sums={"anchored": nll + 0.5 * divergence}, metrics=metrics)

    def measure(self, logits, labels, others):
        own, other = logits.float().log_softmax(-1), others.float().log_softmax(-1)
        divergence = torch.nn.functional.kl_div(other, own, log_target=True, reduction="none").sum(-1)
        return torch.stack([-own.gather(-1, labels[:, None]).squeeze(-1), divergence], dim=-1)


def test_sft_with_the_penalty_has_the_numbers_of_one_loss_of_both_however_the_batch_is_cut(train, tmp_path):
    anchored = train(loss=Anchored(), max_steps=3, output_dir=tmp_path / "anchored")
    pulled = train(loss="sft", penalties=PULL, max_steps=3, max_tokens_per_device=40, output_dir=tmp_path / "pulled")
    assert pulled.loss_history == pytest.approx(anchored.loss_history, rel=1e-4)
    lines = logged(pulled)
    assert lines[0]["penalty/kl"] == pytest.approx(0.0, abs=1e-5)
    for line, other in zip(lines, logged(anchored), strict=True):
        assert line["penalty/kl"] == pytest.approx(0.5 * other["kl"], abs=1e-5)
        assert line["loss"] == pytest.approx(other["nll"] + line["penalty/kl"], rel=1e-4)


class Likelihood:
    """The mean log-likelihood of rows."""

    data = "tokens"

    def terms(self, batch):
        return {"rows": float(batch.num_units)}

    def __call__(self, policy, batch):
        return self.combine(*self.scores(policy, batch))

    def scores(self, policy, batch):
        return batch.sum_by_document(policy.token_logprobs(batch)), {}

    def combine(self, scores, fixed):
        return LossOutput(sums={"rows": -scores.sum()})


class Coupled(Likelihood):
    """The same, from the scores of the whole batch."""

    couples = "batch"


def test_a_loss_that_couples_the_batch_is_penalised_too_and_an_evaluation_is_not(train, rows, tmp_path):
    settings = {"data": rows, "penalties": PULL, "max_steps": 3, "eval_data": rows[:4], "max_tokens_per_device": 40}
    alone, coupled = (
        train(loss=loss(), output_dir=tmp_path / loss.__name__, **settings) for loss in (Likelihood, Coupled)
    )
    assert coupled.loss_history == pytest.approx(alone.loss_history, rel=1e-4)
    assert logged(coupled)[2]["penalty/kl"] == pytest.approx(logged(alone)[2]["penalty/kl"], rel=1e-3) != 0.0
    assert coupled.eval_loss == pytest.approx(alone.eval_loss, rel=1e-4)
    assert not any("kl" in name for name in coupled.eval_metrics)


def test_an_optimizer_that_estimates_gradients_sees_the_penalty(train, tmp_path):
    optimizer = {"name": "evolution", "pairs": 1, "shaping": "none"}
    free, pulled = (
        train(loss="sft", penalties=[{"name": "kl", "weight": weight}], optimizer=optimizer, max_steps=2,
              learning_rate=1e-2, output_dir=tmp_path / str(weight))
        for weight in (1e-6, 100.0)
    )  # fmt: skip
    assert logged(free)[1]["grad_norm"] < 0.5 * logged(pulled)[1]["grad_norm"]


def test_a_cached_reference_cannot_give_the_distributions_and_is_refused(train):
    with expect_error("recipe-conflict", "reference_cache"):
        train(loss="sft", penalties=PULL, reference_cache=True, max_steps=1)
