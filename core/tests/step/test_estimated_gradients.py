"""Optimizers that estimate gradients: what the objective is, that nothing is differentiated, who refuses them."""

import luthier
import pytest
import torch
from luthier import LossOutput
from luthier.builtin.full import FullTuning
from luthier.plugins.records import NoOptions
from luthier.testing import expect_error
from luthier.testing.ranks import in_ranks


class Probe:
    """Fills gradients with ones, and keeps what the objective and autograd say."""

    needs = ("closure",)

    def __init__(self):
        self.told = []

    def build(self, groups):
        self.weights = [p for group in groups for p in group.parameters]
        return torch.optim.SGD([group.settings(0.0) for group in groups], lr=0.0)

    def estimate_gradients(self, objective, seed):
        self.told.append((objective(), objective(), seed, torch.is_grad_enabled()))
        for weight in self.weights:
            weight.grad = torch.ones_like(weight)


class Spread:
    """A loss that couples the batch: how far the rows' log-probabilities lie apart."""

    data, couples = "tokens", "batch"

    def terms(self, batch):
        return {"spread": 1.0 * batch.num_units}

    def scores(self, policy, batch):
        return batch.sum_by_document(policy.token_logprobs(batch)), {}

    def combine(self, scores, fixed):
        return LossOutput(sums={"spread": (scores - scores.mean()).square().sum()})

    def __call__(self, policy, batch):
        return self.combine(*self.scores(policy, batch))


class Pulled(FullTuning):
    """Full tuning with a penalty: half the sum of the squares of all weights."""

    artifact = "model"
    provides = ("trainable-weights",)

    def __init__(self):
        super().__init__(NoOptions())

    def penalty(self):
        return sum(p.square().sum() for group in self.groups() for p in group.parameters) / 2


@pytest.mark.parametrize("loss", ["sft", Spread()], ids=["sft", "coupled"])
def test_the_objective_is_the_loss_of_the_step_penalties_included(train, loss):
    probe = Probe()
    run = train(optimizer=probe, loss=loss, adapter=Pulled(), max_steps=3, max_tokens_per_device=64)
    assert [first for first, _, _, _ in probe.told] == pytest.approx(run.loss_history, rel=1e-6)
    plain = train(optimizer="sgd", loss=loss, adapter=Pulled(), max_steps=1, max_tokens_per_device=64, fresh=True)
    assert probe.told[0][0] == pytest.approx(plain.loss_history[0], rel=1e-5)


def test_each_step_has_its_own_seed_and_the_same_random_numbers_at_each_call(train):
    probe = Probe()
    train(optimizer=probe, max_steps=3, adapter={"name": "lora", "lora_dropout": 0.5})
    assert all(one == other for one, other, _, _ in probe.told)
    seeds = [seed for _, _, seed, _ in probe.told]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**63 for seed in seeds)
    assert not any(graph for _, _, _, graph in probe.told)


def test_what_is_estimated_is_clipped_and_stepped(train):
    probe, norms, starts = Probe(), [], []
    watcher = luthier.on(
        step_started=lambda step: starts.append([p.detach().clone() for p in probe.weights]),
        logged=lambda metrics: norms.append(metrics["grad_norm"]),
    )
    train(optimizer=probe, max_steps=1, max_grad_norm=1.0, lr_scheduler_type="constant", learning_rate=0.5,
          exact_callbacks=[watcher])  # fmt: skip
    norm = sum(weight.numel() for weight in probe.weights) ** 0.5
    assert norms == [pytest.approx(norm, rel=1e-4)]
    moved = starts[0][0] - probe.weights[0].detach()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5 / norm), rtol=1e-2, atol=0)


def test_no_activation_is_counted_for_a_backward_that_is_not_run(train, model_folder, rows):
    settings = {"model": str(model_folder), "data": rows, "global_batch_size": 8, "learning_rate": 1e-2}
    probed, plain = (luthier.plan(**settings, optimizer=o).memory for o in (Probe(), "sgd"))
    assert probed["activations"] < plain["activations"] / 2


def test_a_trainer_with_a_loop_of_its_own_refuses_it(model_folder, rows):
    class Trainer:
        def train(self, session):
            raise AssertionError

    with expect_error("part-incompatible", None, "closure"):
        luthier.train(model=str(model_folder), data=rows, trainer=Trainer(), optimizer=Probe(), max_steps=1)


def test_two_ranks_get_the_objective_of_the_whole_batch(model_folder, rows, tmp_path):
    def told():
        probe = Probe()
        luthier.train(model=str(model_folder), data=rows, output_dir=tmp_path / "ranks", optimizer=probe,
                      global_batch_size=8, learning_rate=1e-2, max_steps=1, exact_callbacks=[])  # fmt: skip
        return probe.told[0][0]

    alone = Probe()
    luthier.train(model=str(model_folder), data=rows, output_dir=tmp_path / "alone", optimizer=alone,
                  global_batch_size=8, learning_rate=1e-2, max_steps=1, exact_callbacks=[])  # fmt: skip
    assert in_ranks(2, told) == pytest.approx([alone.told[0][0]] * 2, rel=1e-5)
