"""Trainers: another loop takes the steps, and folder, callbacks, checkpoints and artifact are those of any run."""

import json
import signal

import luthier
import pytest
import torch
from luthier import LuthierError, Recipe
from luthier.demo import MODEL
from luthier.runs.metrics_file import FILE, read_metrics
from luthier.runs.writing.active_run import Interrupted
from luthier.testing import expect_error
from luthier.training.trainers.frozen_policy import WithoutAdapter
from luthier.training.trainers.trainer_refusals import check_trainer
from transformers import AutoTokenizer

ROWS = [{"prompt": f"The {word}", "answer": word} for word in ("cat", "dog", "sun", "sea")]


class Likelihood:
    """A trainer as small as can be: it makes the words of each prompt likelier, a row a step."""

    settings = ("max_steps", "learning_rate")
    provides = frozenset(("trainable-weights",))

    def __init__(self, stop_after=None):
        self.stop_after, self.before = stop_after, None

    def train(self, session):
        self.before = session.reference()
        session.begin(session.recipe.max_steps)
        for step in range(1, session.recipe.max_steps + 1):
            session.step_started(step)
            loss = self.loss_of(session.model, session)
            loss.backward()
            session.gradients_ready()
            session.optimizer.step()
            session.optimizer.zero_grad()
            if step == self.stop_after:
                session.run.request_stop("enough")
            session.step_ended(float(loss.detach()), float(step), samples=1)
            session.logged({"loss": float(loss.detach()), "reward": 1.0 / step})
            if session.run.stop_reason is not None:
                break
        session.evaluated({"eval_reward": 0.5})
        self.apart = float(self.loss_of(self.before, session)), float(self.loss_of(session.model, session).detach())

    @staticmethod
    def loss_of(model, session):
        ids = torch.tensor([session.tokenizer(session.rows[0].prompt)["input_ids"]])
        return model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss


class Resumable(Likelihood):
    """The same, which can go on: it makes a share of likelihood, a number of its own, grow with each step."""

    share = 0.0

    def state(self):
        return {"share": self.share, "table": torch.full((2,), self.share)}

    def train(self, session):
        self.before, run = session.reference(), session.run
        if session.resumed is not None:
            self.share = float(session.resumed["table"][0])
        session.begin(session.recipe.max_steps)
        for step in range(run.step + 1, session.recipe.max_steps + 1):
            session.step_started(step)
            self.share += 1.0
            loss = self.share * self.loss_of(session.model, session)
            loss.backward()
            session.gradients_ready()
            session.optimizer.step()
            session.optimizer.zero_grad()
            session.step_ended(float(loss.detach()), float(step), samples=1, tokens=3)
            session.logged({"reward": float(loss.detach())})
            if run.stop_reason is not None:
                break
        self.apart = float(self.loss_of(self.before, session))


class Cut:
    """A callback that ends a run, as a fault would, within one step, and counts the steps that it has seen."""

    def __init__(self, step):
        self.step, self.seen, self.resumed_at = step, 0, None

    def state(self):
        return {"seen": self.seen}

    def load_state(self, state):
        self.seen = state["seen"]

    @luthier.event
    def resumed(self, run, step):
        self.resumed_at = step

    @luthier.event
    def step_started(self, run, step):
        if step == self.step:
            raise RuntimeError("cut off")

    @luthier.event
    def step_ended(self, run, step):
        self.seen += 1


class Watcher:
    """What happens, in order."""

    def __init__(self):
        self.seen = []

    @luthier.event
    def run_started(self, run):
        self.seen.append(("run_started", run.total_steps))

    @luthier.event
    def step_ended(self, run, step, metrics):
        self.seen.append(("step_ended", step))

    @luthier.event
    def logged(self, run, step, metrics):
        self.seen.append(("logged", step, metrics["reward"]))

    @luthier.event
    def saved(self, run, step, path):
        self.seen.append(("saved", step))

    @luthier.event
    def evaluated(self, run, metrics):
        self.seen.append(("evaluated", metrics["eval_reward"]))

    @luthier.event
    def stopped(self, run, step, reason):
        self.seen.append(("stopped", step, reason))

    @luthier.event
    def completed(self, run, result):
        self.seen.append(("completed", result.steps))

    @luthier.event
    def failed(self, run, error):
        self.seen.append(("failed", str(error)))


def train(folder, trainer=None, **settings):
    settings = {"max_steps": 2, "learning_rate": 1e-2, "callbacks": ["jsonl"], "data": ROWS, **settings}
    return luthier.train(model="demo", trainer=trainer or Likelihood(), output_dir=folder, **settings)


def test_a_trainer_takes_the_steps_and_the_core_has_the_rest(tmp_path):
    watcher, trainer = Watcher(), Likelihood()
    run = train(tmp_path / "run", trainer, callbacks=["jsonl", watcher], save_steps=1)
    assert watcher.seen == [
        *(("run_started", 2), ("step_ended", 1), ("saved", 1), ("logged", 1, 1.0)),
        *(("step_ended", 2), ("saved", 2), ("logged", 2, 0.5), ("evaluated", 0.5), ("completed", 2)),
    ]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line.get("reward") for line in lines] == [1.0, 0.5, None]
    assert lines[-1]["eval_reward"] == 0.5
    before, after = trainer.apart
    assert before == run.loss_history[0] > run.loss_history[1] > after  # the reference stays where the policy began
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["state"] == "completed" and record["total_steps"] == 2
    said = luthier.generate(tmp_path / "run", "The", max_new_tokens=4)
    assert (
        said
        == luthier.generate(tmp_path / "run", "The", max_new_tokens=4, step=2)
        == run.generate("The", max_new_tokens=4)
    )


def test_a_trainer_stops_where_it_is_asked_and_a_finished_run_is_given_back(tmp_path):
    watcher = Watcher()
    run = train(tmp_path / "run", Likelihood(stop_after=1), callbacks=[watcher], save_final=False)
    assert (run.steps, run.stop_reason) == (1, "enough")
    assert ("stopped", 1, "enough") in watcher.seen
    assert train(tmp_path / "run", callbacks=[watcher], save_final=False).run_id == run.run_id


def test_what_ends_a_trainer_is_in_the_record_and_the_run_cannot_go_on(tmp_path):
    class Broken(Likelihood):
        def train(self, session):
            session.begin(1)
            raise ValueError("no such luck")

    watcher = Watcher()
    with pytest.raises(ValueError, match="luck"):
        train(tmp_path / "run", Broken(), callbacks=[watcher])
    assert watcher.seen[-1] == ("failed", "no such luck")
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "failed"
    with expect_error("part-unsupported", "run"):
        train(tmp_path / "run", Broken(), callbacks=[watcher])


LORA = {"name": "lora", "r": 4}
MOVED = {**LORA, "init_lora_weights": False}
STARTS = {
    "nothing": (LORA, "auto", True, False),
    "dora": ({"name": "dora", "r": 4}, "initial", True, False),
    "something": (MOVED, "auto", True, True),
    "something, called base": (MOVED, "base", True, True),
    "something, called initial": (MOVED, "initial", False, False),
    "no switch": ({"name": "modules", "norms": True}, "auto", False, False),
    "full": ("full", "initial", False, False),
}


@pytest.mark.parametrize("name", STARTS)
def test_the_reference_is_the_untouched_base_or_the_policy_as_it_began(name, tmp_path):
    adapter, reference, without_copy, is_moved = STARTS[name]
    trainer = Likelihood()
    trainer.settings, trainer.needs = (*trainer.settings, "reference"), {"reference"}
    run = train(tmp_path / "run", trainer, adapter=adapter, reference=reference)
    (before, after), start = trainer.apart, run.loss_history[0]
    assert isinstance(trainer.before, WithoutAdapter) == without_copy
    if is_moved:
        plain = train(tmp_path / "plain", adapter=LORA).loss_history[0]
        assert before == plain and abs(start - plain) > 1e-3  # as the base computes
    else:
        assert before == pytest.approx(start, abs=1e-4)
    assert after < start - 1e-3


def test_the_reference_of_an_adapter_that_was_trained_is_its_start_or_the_base(tmp_path):
    first = train(tmp_path / "first", adapter=LORA)
    found = {}
    for reference in ("auto", "base"):
        trainer = Likelihood()
        trainer.settings, trainer.needs = (*trainer.settings, "reference"), {"reference"}
        run = train(tmp_path / reference, trainer, adapter=LORA, adapter_from=str(first.artifact), reference=reference)
        found[reference], start = trainer.apart[0], run.loss_history[0]
    assert found["auto"] == pytest.approx(start, abs=1e-6) and start < first.loss_history[1]
    assert found["base"] == first.loss_history[0]


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_numbers(adapter, tmp_path):
    settings = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2}
    if adapter == "lora":
        settings |= {"adapter": {**MOVED, "lora_dropout": 0.5}, "reference": "initial"}

    def go(folder, cut=None):
        trainer = Resumable()
        trainer.settings, trainer.needs = (*trainer.settings, "reference"), {"reference"}
        watcher = Cut(cut)
        return train(tmp_path / folder, trainer, callbacks=["jsonl", watcher], **settings), trainer, watcher

    whole, trainer, _ = go("whole")
    with pytest.raises(RuntimeError, match="cut off"):
        go("run", cut=3)
    again, other, watcher = go("run")
    assert (watcher.resumed_at, watcher.seen) == (2, 4)
    assert again.loss_history == whole.loss_history
    assert (again.steps, again.samples_seen, again.tokens_seen) == (4, 4, 12)
    assert other.apart == trainer.apart  # the reference is where the policy once began
    lines = [(line["step"], line["reward"]) for line in read_metrics(tmp_path / "run" / FILE)]
    assert lines == [(line["step"], line["reward"]) for line in read_metrics(tmp_path / "whole" / FILE)]
    assert len(lines) == 4
    assert luthier.generate(tmp_path / "run", "The", max_new_tokens=6) == luthier.generate(
        tmp_path / "whole", "The", max_new_tokens=6
    )
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["state"] == "completed" and "error" not in record


def test_a_run_whose_last_step_is_saved_only_writes_its_artifact_and_keeps_its_last_evaluation(tmp_path):
    class Late(Resumable):
        def train(self, session):
            super().train(session)
            session.evaluated({"eval_reward": 0.25})
            raise RuntimeError("after the last step")

    with pytest.raises(RuntimeError, match="after the last"):
        train(tmp_path / "run", Late())
    run = train(tmp_path / "run", Late())
    assert (run.steps, run.eval_metrics) == (2, {"eval_reward": 0.25})


def test_a_run_without_a_checkpoint_begins_anew_in_its_folder(tmp_path):
    with pytest.raises(RuntimeError, match="cut off"):
        train(tmp_path / "run", Resumable(), callbacks=[Cut(1)])
    began = json.loads((tmp_path / "run/run.json").read_text())["run_id"]
    run = train(tmp_path / "run", Resumable(), callbacks=[Cut(None)])
    assert (run.steps, run.run_id) == (2, began)


def test_a_run_goes_on_with_no_other_rows(tmp_path):
    with pytest.raises(RuntimeError, match="cut off"):
        train(tmp_path / "run", Resumable(), callbacks=[Cut(2)], save_steps=1)
    with pytest.raises(LuthierError, match="rows") as caught:
        train(tmp_path / "run", Resumable(), callbacks=[Cut(None)], save_steps=1, data=ROWS[1:])
    assert caught.value.code == "data-changed"


def test_a_signal_is_followed_by_a_checkpoint_from_which_the_same_command_goes_on(tmp_path):
    class Signal(Cut):
        @luthier.event
        def step_started(self, run, step):
            if step == self.step:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="the same command goes on"):
        train(tmp_path / "run", Resumable(), callbacks=[Signal(1)], save_final=False)
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "stopped"
    assert train(tmp_path / "run", Resumable(), callbacks=[Signal(None)], save_final=False).steps == 2


def test_a_trainer_that_takes_no_step_is_an_error_that_names_it(tmp_path):
    trainer = Likelihood()
    trainer.train = lambda session: session.begin(1)
    with pytest.raises(LuthierError, match="without a step") as caught:
        train(tmp_path / "run", trainer)
    assert (caught.value.code, "Likelihood" in caught.value.where) == ("part-invalid", True)
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "failed"


def test_a_trainer_sees_the_rows_before_the_model_is_loaded_and_a_folder_appears(tmp_path):
    class Wary(Likelihood):
        def check_rows(self, recipe, rows, validation):
            raise LuthierError("data-empty", f"{len(rows)} and {len(validation)} for {recipe.max_steps} steps")

    with pytest.raises(LuthierError, match="4 and 1 for 2 steps"):
        train(tmp_path / "run", Wary(), eval_data=ROWS[:1])
    assert not (tmp_path / "run").exists()


def test_a_setting_that_no_recipe_has_may_not_be_listed():
    trainer = Likelihood()
    trainer.settings = ("max_steps", "data.max_lenght")
    recipe = Recipe.from_dict({"model": "demo", "data": "rows.jsonl", "trainer": trainer})
    with pytest.raises(LuthierError) as caught:
        check_trainer(recipe)
    assert (caught.value.code, caught.value.found) == ("plugin-invalid", "data.max_lenght")
    assert "'data.max_length'" in caught.value.remedy


UNREAD = {"num_threads": 1, "layerwise_lr_decay": 0.5, "num_train_epochs": 2.0, "data.train_on": "all"}


@pytest.mark.parametrize("name", UNREAD)
def test_a_setting_that_the_trainer_does_not_read_is_refused_by_its_name(name):
    data, settings = {"path": "rows.jsonl"}, {}
    (data if name.startswith("data.") else settings)[name.removeprefix("data.")] = UNREAD[name]
    recipe = Recipe.from_dict({"model": "demo", "data": data, "max_steps": 1, "trainer": Likelihood(), **settings})
    with expect_error("recipe-conflict", name):
        check_trainer(recipe)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"tokenizer": AutoTokenizer.from_pretrained(MODEL)}, "tokenizer"),
        ({"resume": "run/checkpoints/step-00000001"}, "resume"),
    ],
)
def test_what_only_the_own_loop_can_do_is_refused(settings, where, tmp_path):
    settings = {"model": "demo", **settings}
    with pytest.raises(LuthierError) as caught:
        luthier.train(trainer=Likelihood(), output_dir=tmp_path, data=ROWS, max_steps=1, **settings)
    assert caught.value.where == where


def test_a_plan_and_an_evaluation_say_whose_the_steps_are():
    with expect_error("part-unsupported", "trainer"):
        luthier.plan(model="demo", data=ROWS, trainer=Likelihood(), max_steps=1)


def test_no_trainer_is_written_as_none_and_read_back(tmp_path):
    recipe = Recipe.from_dict({"model": "demo", "data": "rows.jsonl"})
    assert recipe.to_dict()["trainer"] is None
    recipe.write(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml").trainer is None


def test_a_reference_without_its_adapter_leaves_the_policy_in_its_mode():
    class Switch:
        def disabled(self):
            return torch.no_grad()

    model = torch.nn.Linear(2, 2).train()
    reference = WithoutAdapter(model, Switch())
    reference.eval()
    assert model.training and not list(reference.parameters())
    assert not reference(torch.ones(1, 2)).requires_grad


def test_prompts_longer_than_max_length_are_dropped_or_an_error(tmp_path):
    rows = [*ROWS, {"prompt": "The sea " * 30, "answer": "long"}]
    trainer = Likelihood()
    trainer.settings = (*trainer.settings, "data.max_length", "data.overlong")
    seen = []
    trainer.train = lambda session: seen.append(len(session.rows)) or Likelihood.train(trainer, session)
    train(tmp_path / "run", trainer, data=rows, max_steps=1, **{"data.max_length": 16})
    assert seen == [len(ROWS)]
    with expect_error("data-overlong", "data[4]", "16"):
        train(tmp_path / "other", trainer, data=rows, **{"data.max_length": 16, "data.overlong": "error"})
