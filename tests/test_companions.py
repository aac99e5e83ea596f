"""The reference and the teacher of a run: what it begins from is what it is compared with, cut off or not, on one rank or two."""

import json
import math
import os
import signal
from pathlib import Path

import luthier
import pytest
import torch
from luthier.checkpoint import folder as checkpoint
from luthier.errors import LuthierError
from luthier.runs.writing.active_run import Interrupted
from luthier.testing import expect_error
from luthier.testing.ranks import in_ranks
from luthier.testing.worlds import save_tiny_model

LORA = {"name": "lora", "r": 4, "lora_dropout": 0.0, "target_modules": "all-linear"}
DROPPING = {**LORA, "lora_dropout": 0.1}


class Nearby:
    """-log sigmoid of half the log-ratio of policy and reference over each document: ln 2 where they agree."""

    data = "tokens"
    needs = ("reference",)

    def terms(self, batch):
        return {"nearby": float(batch.num_documents)}

    def __call__(self, policy, batch):
        ratios = policy.token_logprobs(batch) - policy.reference().token_logprobs(batch)
        documents = batch.sum_by_document(ratios)
        return luthier.LossOutput(sums={"nearby": -torch.nn.functional.logsigmoid(documents / 2).sum()})


class Taught:
    """The divergence from a teacher, token by token."""

    data = "tokens"
    needs = ("teacher",)

    def terms(self, batch):
        return {"taught": float(len(batch.supervised))}

    def __call__(self, policy, batch):
        def divergence(own, labels, theirs):
            theirs = theirs.float().log_softmax(-1)
            return (theirs.exp() * (theirs - own.float().log_softmax(-1))).sum(-1)

        return luthier.LossOutput(sums={"taught": policy.map_logits(batch, divergence, other=policy.teacher()).sum()})


@pytest.fixture(scope="module")
def rows():
    return [{"prompt": f"{i} and {i % 5}?", "completion": f"{i + i % 5}" * (1 + i % 3)} for i in range(16)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def train(model_folder, rows, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(**changes):
        return luthier.train(**{**settings, **changes})

    settings = {
        "model": str(model_folder),
        "data": str(data),
        "output_dir": str(tmp_path / "run"),
        "exact_callbacks": ["jsonl"],
        "global_batch_size": 8,
        "max_tokens_per_device": 64,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "distributed": "ddp",
    }
    run.settings = settings
    return run


@pytest.fixture
def adapter_folder(train, tmp_path):
    return train(adapter=LORA, output_dir=str(tmp_path / "first"), global_batch_size=4).artifact


def begins(name, folder):
    return {
        "lora": {"adapter": LORA},
        "trained lora": {"adapter": LORA, "adapter_from": str(folder)},
        "full": {"adapter": "full"},
    }[name]


@pytest.mark.parametrize("start", ["lora", "trained lora", "full"])
def test_the_reference_is_the_policy_as_it_begins(train, adapter_folder, start):
    run = train(loss=Nearby(), **begins(start, adapter_folder))
    assert run.loss_history[0] == pytest.approx(math.log(2), abs=1e-6)
    assert run.loss_history[-1] < 0.6


def test_a_run_begins_with_the_weights_of_its_adapter(train, adapter_folder, tmp_path):
    first = luthier.Run.load(adapter_folder.parent) if hasattr(luthier.Run, "load") else None
    run = train(adapter=LORA, adapter_from=str(adapter_folder.parent), learning_rate=0.0)
    from safetensors.torch import load_file

    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (adapter_folder, run.artifact))
    assert all(torch.equal(one[name], other[name]) for name in one) and first is None


def test_base_is_the_model_without_the_adapter(train, adapter_folder):
    run = train(loss=Nearby(), reference="base", **begins("trained lora", adapter_folder))
    assert abs(run.loss_history[0] - math.log(2)) > 1e-3


def test_a_reference_of_its_own_is_read_and_asked(train, tmp_path, adapter_folder):
    other = save_tiny_model(tmp_path / "other", seed=5)
    run = train(loss=Nearby(), adapter=LORA, reference={"model": str(other)})
    assert abs(run.loss_history[0] - math.log(2)) > 1e-3
    same = train(
        loss=Nearby(), reference={"model": str(adapter_folder)}, output_dir=str(tmp_path / "same"),
        **begins("trained lora", adapter_folder),
    )  # fmt: skip
    assert same.loss_history[0] == pytest.approx(math.log(2), abs=1e-6)


def stop_after(last):
    def end(step):
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    return luthier.on(step_ended=end)


@pytest.mark.parametrize("start", ["lora", "trained lora", "full"])
def test_a_run_that_was_cut_off_goes_on_with_the_same_reference(train, adapter_folder, tmp_path, start):
    given = {"loss": Nearby(), **begins(start, adapter_folder)}
    given["adapter"] = "full" if start == "full" else DROPPING
    straight = train(**given, output_dir=str(tmp_path / "straight"))
    with pytest.raises(Interrupted):
        train(**given, exact_callbacks=["jsonl", stop_after(3)])
    (taken,) = checkpoint.list_checkpoints(tmp_path / "run")
    for file in Path(adapter_folder).glob("*.safetensors"):
        file.unlink()  # what the run began from may be gone
    assert train(**given).loss_history == straight.loss_history
    elsewhere = train(**given, output_dir=str(tmp_path / "elsewhere"), resume=taken)
    assert elsewhere.loss_history == straight.loss_history


def seen(settings):
    return luthier.train(**settings, loss=Nearby()).loss_history


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("start", ["trained lora", "full"])
def test_two_ranks_have_the_reference_of_one(train, adapter_folder, model_folder, tmp_path, start, strategy):
    exact = {"model": {"name_or_path": str(model_folder), "dtype": "float64"}, "memory_check": False}
    settings = {**train.settings, **exact, **begins(start, adapter_folder)}
    alone = seen({**settings, "output_dir": str(tmp_path / "alone")})
    for found in in_ranks(2, seen, {**settings, "distributed": strategy}):
        assert found == pytest.approx(alone, rel=1e-9)


def test_a_teacher_is_learned_from(train, tmp_path):
    teacher = save_tiny_model(tmp_path / "teacher", seed=5)
    run = train(loss=Taught(), adapter="full", teacher=str(teacher), learning_rate=3e-3, num_train_epochs=6)
    assert run.loss_history[-1] < run.loss_history[0] / 2


def test_a_teacher_may_carry_an_adapter_or_be_a_run(train, tmp_path, adapter_folder, model_folder):
    kept = {"loss": Taught(), "adapter": LORA, "learning_rate": 0.0, "max_steps": 1}
    plain = train(**kept, teacher=str(model_folder))
    ways = [str(adapter_folder), str(adapter_folder.parent)]
    ways.append({"model": str(model_folder), "adapter": str(adapter_folder)})
    runs = [train(**kept, teacher=way, output_dir=str(tmp_path / f"{i}")) for i, way in enumerate(ways)]
    assert plain.loss_history[0] == pytest.approx(0.0, abs=1e-6)
    assert len({run.loss_history[0] for run in runs}) == 1 and runs[0].loss_history[0] > 1e-3


def refused(train, tmp_path, **changes):
    for call in (luthier.plan, luthier.train):
        with pytest.raises(LuthierError) as caught:
            call(**{**train.settings, **changes})
    assert not (tmp_path / "run").exists()
    return caught.value


def test_what_is_needed_and_absent_is_refused_before_a_folder_appears(train, tmp_path):
    assert "needs teacher, which the recipe does not provide" in str(refused(train, tmp_path, loss=Taught()))
    found = refused(train, tmp_path, loss=Nearby(), reference="base", adapter="full")
    assert (found.code, found.where, found.found) == ("recipe-conflict", "reference", "base")


def test_what_nobody_needs_is_refused(train, tmp_path, model_folder):
    for field, value in (("teacher", str(model_folder)), ("reference", "initial"), ("reference_cache", True)):
        found = refused(train, tmp_path, **{field: value})
        assert (found.code, found.where) == ("recipe-conflict", field)


@pytest.mark.parametrize("loss", [Nearby, Taught])
def test_a_companion_with_another_vocabulary_is_refused_unless_the_loss_aligns(train, tmp_path, loss):
    field = loss.needs[0]
    other = save_tiny_model(tmp_path / "other", vocab_size=300)
    found = refused(train, tmp_path, loss=loss(), **{field: {"model": str(other)}})
    assert found.where == f"{field}.model" and "300" in str(found)
    aligning = loss()
    aligning.aligns = True
    if field == "reference":
        assert train(loss=aligning, reference={"model": str(other)}, max_steps=1).steps == 1


def test_an_adapter_that_does_not_fit_is_refused_before_a_folder_appears(train, tmp_path, adapter_folder):
    other = save_tiny_model(tmp_path / "other", seed=9)
    cases = {
        "trained on another base model": {"adapter": LORA, "model": str(other)},
        "the options 8": {"adapter": {**LORA, "r": 8}},
        "tensors": {"adapter": {**LORA, "target_modules": ["q_proj"]}},
        "whole model": {"adapter": LORA, "adapter_from": str(train(output_dir=str(tmp_path / "whole")).artifact)},
        "no such folder": {"adapter": LORA, "adapter_from": str(tmp_path / "nowhere")},
    }
    for told, changes in cases.items():
        found = refused(train, tmp_path, **{"adapter_from": str(adapter_folder), **changes})
        assert told in str(found) and "adapter_from" in str(found)


def test_a_reference_that_differs_before_the_first_step_is_refused(train):
    class Shifted(Nearby):
        pass

    from luthier_lora.adapter import LoraAdapter
    from luthier_lora.options import Lora

    class Wrong(LoraAdapter):
        provides = ("reference", "trainable-weights")

        def attach(self, model, context):
            model = super().attach(model, context)
            with torch.no_grad():
                self.groups()[0].parameters[1].add_(0.3)
            return model

    with expect_error("part-invalid", "reference"):
        train(loss=Shifted(), adapter=Wrong(Lora(r=4, lora_dropout=0.0)))
    says = Wrong(Lora(r=4, lora_dropout=0.0))
    says.tolerance = 1.0  # then its initial weights are kept
    assert train(loss=Shifted(), adapter=says, fresh=True).loss_history[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_run_in_the_models_place_brings_its_base_and_adapter(train, adapter_folder, tmp_path):
    settings = {name: value for name, value in train.settings.items() if name != "model"}
    run = luthier.train(model=str(adapter_folder.parent), learning_rate=0.0, max_steps=1,
                        **{k: v for k, v in settings.items() if k not in ("learning_rate", "num_train_epochs")})  # fmt: skip
    recipe = luthier.Recipe.load(run.output_path / "recipe.yaml")
    assert recipe.adapter_from == str(adapter_folder) and recipe.adapter.r == 4
    assert recipe.model.name_or_path == train.settings["model"]


def test_the_plan_says_what_companions_cost(train, tmp_path):
    teacher = save_tiny_model(tmp_path / "teacher", seed=5)
    plain = luthier.plan(**train.settings)
    taught = luthier.plan(**train.settings, loss=Taught(), teacher=str(teacher))
    lowered = luthier.plan(**train.settings, loss=Taught(), teacher=str(teacher), precision="bf16")
    kept = luthier.plan(**train.settings, loss=Nearby())
    size = sum(file.stat().st_size for file in teacher.glob("*.safetensors"))
    assert plain.memory.get("teacher", 0) == 0 and taught.memory["teacher"] == pytest.approx(size, rel=0.1)
    assert lowered.memory["teacher"] == pytest.approx(size / 2, rel=0.1)  # in the dtype of the run's products
    assert kept.memory["reference"] == pytest.approx(size, rel=0.1)
    assert any("teacher" in note for note in taught.notes) and any("reference" in note for note in kept.notes)
    assert taught.time["flops_per_token"] > plain.time["flops_per_token"]  # the rate is measured anew by each


@pytest.mark.parametrize("start", ["lora", pytest.param("trained lora", marks=pytest.mark.slow), "full"])
def test_a_cached_reference_gives_the_values_of_a_live_one(train, adapter_folder, tmp_path, start):
    given = {"loss": Nearby(), "data": {**_data(train), "validation": 0.25}, **begins(start, adapter_folder)}
    live = train(**given, output_dir=str(tmp_path / "live"))
    cached = train(**given, reference_cache=True)
    assert cached.loss_history == pytest.approx(live.loss_history, abs=1e-6)
    assert cached.eval_loss == pytest.approx(live.eval_loss, abs=1e-6)
    alone = {**given, "packing": False}
    live = train(**alone, output_dir=str(tmp_path / "live alone"))
    cached = train(**alone, reference_cache=True, output_dir=str(tmp_path / "alone"))
    assert cached.loss_history == live.loss_history  # the same packing: to the bit


def _data(train):
    return {"train": train.settings["data"]}


@pytest.mark.parametrize("start", [pytest.param("trained lora", marks=pytest.mark.slow), "full"])
def test_a_run_with_a_cached_reference_goes_on_with_it(train, adapter_folder, tmp_path, start):
    given = {"loss": Nearby(), "reference_cache": True, **begins(start, adapter_folder)}
    straight = train(**given, output_dir=str(tmp_path / "straight"))
    with pytest.raises(Interrupted):
        train(**given, exact_callbacks=["jsonl", stop_after(3)])
    (taken,) = checkpoint.list_checkpoints(tmp_path / "run")
    assert train(**given).loss_history == straight.loss_history
    elsewhere = train(**given, output_dir=str(tmp_path / "elsewhere"), resume=taken)
    assert elsewhere.loss_history == straight.loss_history


def test_a_cache_of_other_rows_is_refused(train, tmp_path):
    given = {"loss": Nearby(), "reference_cache": True}
    with pytest.raises(Interrupted):
        train(**given, exact_callbacks=["jsonl", stop_after(3)])
    data = Path(train.settings["data"])
    data.write_text(data.read_text().replace("0 and 0", "9 and 9"))
    with expect_error("checkpoint-other", "reference_cache") as caught:
        train(**given, allow_changed="data")
    assert caught.value.where == "reference_cache"


@pytest.mark.parametrize("changed", ["template", "weights"])
def test_a_cache_of_another_template_or_of_other_weights_is_refused(train, tmp_path, changed):
    own = tmp_path / "own"
    save_tiny_model(own)
    given = {"loss": Nearby(), "reference_cache": True, "model": str(own)}
    with pytest.raises(Interrupted):
        train(**given, exact_callbacks=["jsonl", stop_after(3)])
    if changed == "weights":
        save_tiny_model(own, seed=9)
    else:
        file = next(path for path in own.iterdir() if path.suffix == ".jinja")
        file.write_text(file.read_text() + "\n")
    with pytest.raises(LuthierError) as caught:
        train(**given, allow_changed=["model", "data"])
    assert caught.value.where == "reference_cache" and changed in str(caught.value)


class Asking(Nearby):
    def __call__(self, policy, batch):
        policy.reference().map_logits(batch, lambda logits, labels: logits.logsumexp(-1))
        return super().__call__(policy, batch)


class Deriving(Nearby):
    """Nearby, of documents with other tokens than the rows'."""

    def __call__(self, policy, batch):
        import attrs

        return super().__call__(policy, attrs.evolve(batch, input_ids=batch.input_ids.roll(1)))


def test_any_other_question_to_a_cache_is_refused_by_the_plan(train, tmp_path):
    found = refused(train, tmp_path, loss=Asking(), reference_cache=True)
    assert found.where == "reference_cache" and "map_logits" in str(found)
    found = refused(train, tmp_path, loss=Nearby(), reference_cache=True, data={**_data(train), "streaming": True})
    assert found.where == "reference_cache" and "stream" in str(found)


def test_documents_that_no_row_has_are_asked_of_the_live_reference(train, tmp_path):
    live = train(loss=Deriving(), adapter=LORA, output_dir=str(tmp_path / "live"))
    cached = train(loss=Deriving(), adapter=LORA, reference_cache=True)
    assert cached.loss_history == live.loss_history


def seen_cached(settings):
    return luthier.train(**settings, loss=Nearby(), reference_cache=True).loss_history


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_share_a_cache(train, model_folder, tmp_path, strategy):
    exact = {"model": {"name_or_path": str(model_folder), "dtype": "float64"}, "memory_check": False}
    settings = {**train.settings, **exact, "adapter": "full"}
    alone = seen({**settings, "output_dir": str(tmp_path / "alone")})
    for found in in_ranks(2, seen_cached, {**settings, "distributed": strategy}):
        assert found == pytest.approx(alone, rel=1e-9)


def test_the_reference_that_was_used_stands_in_the_record(train):
    run = train(loss=Nearby(), adapter=LORA, max_steps=1)
    assert json.loads((run.output_path / "run.json").read_text())["decisions"]["reference"]["value"] == "disabled"


def test_a_decision_about_the_layout_is_logged_once(train, tmp_path):
    pairs = [{"prompt": "a b", "chosen": f"{i}", "rejected": "no"} for i in range(8)]

    class Longer(Taught):
        """The chosen answer's log-probabilities less the rejected one's."""

        data, needs = "preference", ()

        def terms(self, batch):
            return {"taught": float(len(batch.pairs))}

        def __call__(self, policy, batch):
            scores = batch.sum_by_document(policy.token_logprobs(batch))
            return luthier.LossOutput(sums={"taught": (scores[batch.pairs[:, 1]] - scores[batch.pairs[:, 0]]).sum()})

    run = train(loss=Longer(), adapter=LORA, max_steps=1, data=pairs)
    lines = [json.loads(line) for line in (run.output_path / "log.jsonl").read_text().splitlines()]
    assert sum(line.get("name") == "shared_prompts" for line in lines) <= 1
