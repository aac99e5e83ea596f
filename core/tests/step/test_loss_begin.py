"""A loss prepares itself once: before the first step, over batches, on every rank alike; checkpoints keep what it knows."""

import attrs
import luthier
import pytest
import torch
from luthier import LossOutput
from luthier.recipe.objects import Objects
from luthier.training.reopen import evaluate_again, reopen_run


class Centred:
    """Log-probabilities, measured from their mean over some batches before training."""

    data = "tokens"

    def __init__(self, batches=3):
        self.batches, self.centre, self.begun = batches, None, 0

    def begin(self, context):
        self.begun += 1
        found = context.over(context.batches(self.batches), measured)
        self.centre = torch.stack([one["sum"] for one in found]).sum() / sum(one["count"] for one in found)

    def terms(self, batch):
        return {"centred": 1.0 * len(batch.supervised)}

    def __call__(self, policy, batch):
        logprobs = policy.token_logprobs(batch)
        return LossOutput(sums={"centred": (logprobs - self.centre)[batch.supervised].square().sum()})

    def state(self):
        return {"centre": self.centre}

    def load_state(self, state):
        self.centre = state["centre"]


def measured(policy, batch):
    assert not torch.is_grad_enabled()
    return {"sum": policy.token_logprobs(batch).sum(), "count": len(batch.supervised), "where": list(batch.where)}


def test_it_begins_once_and_a_resumed_run_has_its_state(train, tmp_path):
    whole = train(loss=Centred(), output_dir=tmp_path / "whole")

    def die(step):
        if step == 3:
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        train(loss=Centred(), save_steps=1, exact_callbacks=[luthier.on(step_started=die)])
    again = Centred()
    run = train(loss=again, save_steps=1)
    assert again.begun == 0
    assert run.loss_history == whole.loss_history
    assert again.centre.item() != 0


def test_a_run_without_a_checkpoint_begins_again(train):
    def die(step):
        raise RuntimeError("cut off")

    first, second = Centred(), Centred()
    with pytest.raises(RuntimeError, match="cut off"):
        train(loss=first, exact_callbacks=[luthier.on(step_ended=die)])
    train(loss=second)
    assert (first.begun, second.begun) == (1, 1)
    assert torch.equal(first.centre, second.centre)


def test_another_loss_than_the_checkpoints_begins_on_resume(train, tmp_path):
    first = train(save_steps=1, output_dir=tmp_path / "first")
    fresh = Centred()
    resumed = {"resume": first.output_path / "checkpoints/step-00000001", "allow_changed": "parts,settings"}
    train(loss=fresh, output_dir=tmp_path / "second", **resumed)
    assert fresh.begun == 1


def test_a_finished_run_is_evaluated_with_the_state_it_ended_with(train, rows, tmp_path):
    run = train(loss=Centred(), eval_data=rows[:4])
    recipe = attrs.evolve(run._setup.recipe, loss=Centred())
    setup = reopen_run(run.output_path, (recipe, Objects(data=rows, eval_data=rows[:4])))
    assert evaluate_again(setup)["eval_loss"] == pytest.approx(run.eval_loss, rel=1e-6)


def test_a_plan_rehearses_the_beginning_over_one_batch(model_folder, rows):
    seen = []

    class Watched(Centred):
        def begin(self, context):
            super().begin(context)
            seen.append(context.purpose)

        def __deepcopy__(self, memo):
            return self

    found = luthier.plan(model=str(model_folder), data=rows, loss=Watched(), global_batch_size=8)
    assert seen == ["plan"]
    assert not [note for note in found.notes if "not predicted" in note]
