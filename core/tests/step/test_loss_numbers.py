"""What a run says of its loss: sums over weights over any number of steps, names of its own, perplexity where declared."""

import json

import luthier
import pytest
from luthier import LossOutput, LuthierError
from luthier.plugins.contracts.metric_names import PREFIXES, RUN_METRICS
from luthier.step.update import Update, pooled_loss
from luthier.testing import expect_error


class PerRow:
    """Each row costs its negative log-likelihood; a second term counts the documents twice."""

    data = "tokens"

    def terms(self, batch):
        return {"rows": 1.0 * batch.num_units, "half": 2.0 * batch.num_documents}

    def __call__(self, policy, batch):
        rows = batch.sum_by_document(-policy.token_logprobs(batch))
        return LossOutput(sums={"rows": rows.sum(), "half": rows.square().sum()})


class Renamed(PerRow):
    """Reports a metric of any name."""

    def __init__(self, name):
        self.name = name

    def __call__(self, policy, batch):
        return LossOutput(sums=super().__call__(policy, batch).sums, metrics={self.name: (1.0, 1.0)})


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def step(loss, supervised, terms=None, penalty=0.0):
    return Update(
        loss=loss, terms=terms or {"own": (loss, 1.0)}, grad_norm=1.0, learning_rate=0.1, tokens=supervised,
        supervised_tokens=supervised, documents=1, seconds=1.0, metrics={"penalty": (penalty, 1.0)},
    )  # fmt: skip


def test_four_pairs_of_which_two_cost_nothing_cost_a_half_whatever_their_tokens():
    steps = [step(loss, tokens) for loss, tokens in zip([1.0, 0.0, 0.0, 1.0], [90, 1, 2, 30], strict=True)]
    assert pooled_loss(steps) == 0.5


def test_terms_are_divided_each_by_its_own_weight_and_the_penalty_is_a_mean():
    first = step(0.0, 5, {"a": (3.0, 1.0), "b": (2.0, 4.0)}, penalty=0.5)
    second = step(0.0, 5, {"a": (1.0, 3.0), "b": (0.0, 0.0)}, penalty=1.5)
    assert pooled_loss([first, second]) == pytest.approx(4 / 4 + 2 / 4 + 1.0)


def test_the_logged_loss_of_several_steps_is_that_of_one_step_with_all_their_rows(train, tmp_path):
    frozen = {"loss": PerRow(), "learning_rate": 1e-30, "precision": "float32"}
    train(**frozen, output_dir=tmp_path / "one", global_batch_size=24)
    train(**frozen, output_dir=tmp_path / "three", logging_steps=3)
    (_, whole), *_ = logged(tmp_path / "one")
    ((number, pooled),) = logged(tmp_path / "three")
    assert number == 3
    assert pooled == pytest.approx(whole, rel=1e-5)


def test_a_window_that_a_checkpoint_divides_is_logged_as_if_nothing_had_happened(train, tmp_path):
    def die(run, step):
        if step == 2:
            raise RuntimeError("cut off")

    shared = {"loss": PerRow(), "logging_steps": 3, "save_steps": 1}
    train(**shared, output_dir=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="cut off"):
        train(**shared, exact_callbacks=["jsonl", luthier.on(step_started=die)])
    train(**shared)
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


@pytest.mark.parametrize("name", ["loss", "grad_norm", "samples", "perplexity", "eval_loss", "gradient/layers.1"])
def test_a_metric_with_a_name_of_the_runs_own_is_refused(train, name):
    with expect_error("part-invalid", "loss") as refused:
        train(loss=Renamed(name))
    assert (refused.value.code, refused.value.where) == ("part-invalid", "loss")


def test_every_number_of_the_run_is_among_the_names_that_parts_may_not_use(train, tmp_path, rows):
    train(data=rows, eval_data=rows[:2], gradient_flow_steps=1, max_steps=1)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line if not name.startswith(PREFIXES)}
    assert names - {"accuracy", "time", "event"} <= RUN_METRICS


def test_perplexity_is_reported_where_the_loss_declares_it_alone(train, tmp_path, rows):
    plain = train(loss=PerRow(), eval_data=rows[:3], max_steps=1, output_dir=tmp_path / "plain")
    assert "eval_perplexity" not in plain.eval_metrics
    declared = PerRow()
    declared.perplexity = True
    named = train(loss=declared, eval_data=rows[:3], max_steps=1, output_dir=tmp_path / "named")
    assert named.eval_metrics["eval_perplexity"] > 0
    assert "eval_perplexity" in train(eval_data=rows[:3], max_steps=1, output_dir=tmp_path / "sft").eval_metrics


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda total: total, ("loss", "LossOutput")),
        (lambda total: LossOutput(sums={"rows": 1.0}), ("loss",)),
        (lambda total: LossOutput(sums={"rows": total[None]}), ("loss",)),
        (lambda total: LossOutput(sums={"router_aux": total}), ("loss",)),
        (lambda total: LossOutput(sums={"rows": total}, metrics={"hits": 1.0}), ("loss",)),
        (lambda total: LossOutput(sums={"pairs": total}), ("loss",)),
        (lambda total: LossOutput(sums={"rows": total.detach()}), ("loss",)),
    ],
)
def test_a_wrong_return_says_what_was_expected(train, returned, says):
    class Wrong(PerRow):
        def __call__(self, policy, batch):
            return returned(policy.token_logprobs(batch).sum())

    with pytest.raises(LuthierError) as refused:
        train(loss=Wrong())
    assert all(fact in str(refused.value) for fact in says)
    assert (refused.value.code, refused.value.where) == ("part-invalid", "loss")
