"""Penalties in the steps of a trainer: they pull as in Luthier's own, and a resumed run knows where it began."""

import luthier
import pytest
import torch
from luthier.runs.metrics_file import FILE, read_metrics
from luthier.testing import expect_error

ROWS = [{"prompt": f"The {word}", "answer": word} for word in ("cat", "dog", "sun", "sea")]


class Pushing:
    """A trainer that makes the words of the first prompt likelier, and logs every other step."""

    settings = ("max_steps", "learning_rate")
    provides = frozenset(("trainable-weights",))

    def state(self):
        return {}

    def train(self, session):
        session.begin(session.recipe.max_steps)
        ids = torch.tensor([session.tokenizer(session.rows[0].prompt)["input_ids"]])
        for step in range(session.run.step + 1, session.recipe.max_steps + 1):
            session.step_started(step)
            loss = session.model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
            loss.backward()
            session.gradients_ready()
            session.optimizer.step()
            session.optimizer.zero_grad()
            session.step_ended(float(loss.detach()), float(step), samples=1)
            if step % 2 == 0:
                session.logged({})


class Cut:
    """A callback that ends a run, as a fault would, within one step."""

    def __init__(self, step):
        self.step = step

    @luthier.event
    def step_started(self, run, step):
        if step == self.step:
            raise RuntimeError("cut off")


def train(model, folder, weight, cut=None):
    return luthier.train(
        model=str(model), trainer=Pushing(), data=ROWS, adapter="full", learning_rate=1e-3, max_steps=4, save_steps=1,
        penalties=[{"name": "l2_start", "weight": weight}], callbacks=["jsonl", Cut(cut)], output_dir=folder,
    )  # fmt: skip


def penalties_of(folder):
    return [line["penalty"] for line in read_metrics(folder / FILE) if "penalty" in line]


def test_a_penalty_pulls_in_the_steps_of_a_trainer_and_a_resumed_run_keeps_its_start(model_folder, tmp_path):
    free, pulled = (
        train(model_folder, tmp_path / name, weight) for name, weight in (("free", 1e-9), ("pulled", 100.0))
    )
    assert pulled.loss_history[-1] > free.loss_history[-1]
    distances = [penalties_of(tmp_path / "free")[-1] * 1e9, penalties_of(tmp_path / "pulled")[-1] / 100]
    assert 0 < distances[1] < 0.5 * distances[0]
    with pytest.raises(RuntimeError, match="cut off"):
        train(model_folder, tmp_path / "run", 100.0, cut=4)
    resumed = train(model_folder, tmp_path / "run", 100.0)
    assert resumed.loss_history == pulled.loss_history
    assert penalties_of(tmp_path / "run") == penalties_of(tmp_path / "pulled")


def test_a_penalty_of_the_tokens_is_refused_by_its_name_as_a_trainer_has_the_policy(model_folder, tmp_path):
    with expect_error("part-unsupported", "penalties.1"):
        luthier.train(model=str(model_folder), trainer=Pushing(), data=ROWS, penalties=["l2", "kl"],
                      output_dir=tmp_path / "run", max_steps=1)  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_trainer_is_refused_in_several_processes_before_a_folder_appears(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with expect_error("part-unsupported", where="trainer"):
        train(model_folder, tmp_path / "run", 1.0)
    assert not (tmp_path / "run").exists()
