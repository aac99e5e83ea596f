"""Luthier from Python: a run's result and what one does with it, and the functions beside `train`."""

import json

import luthier
import pytest
import torch
import yaml
from luthier import LuthierError
from luthier.testing import expect_error
from luthier_lora import Lora
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTION = [{"role": "user", "content": "3 and 3?..."}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("python") / "run"


@pytest.fixture(scope="module")
def run(model_folder, rows, place):
    """A run on rows in Python, with held-out rows."""
    return luthier.train(
        model=str(model_folder),
        data=rows,
        eval_data=rows[:4],
        adapter=Lora(r=4),
        optimizer={"name": "adamw", "weight_decay": 0.0},
        quantizer="none",
        loss="sft",
        exact_callbacks=["jsonl"],
        output_dir=place,
        global_batch_size=8,
        num_train_epochs=2,
        learning_rate=1e-2,
    )


def test_a_run_tells_what_it_did(run, place, rows):
    assert run.steps == len(run.loss_history) == 6
    assert run.final_loss == run.loss_history[-1] < run.loss_history[0]
    assert run.samples_seen == 2 * len(rows)
    assert run.tokens_seen == sum(json.loads(line)["tokens"] for line in _training_lines(place))
    assert run.eval_loss == run.eval_metrics["eval_loss"] > 0
    assert run.duration_seconds > 0
    assert run.output_path == place
    assert run.artifact == place / "adapter"
    assert (run.merged, run.stop_reason) == (None, None)
    assert json.loads((place / "run.json").read_text())["run_id"] == run.run_id


def _training_lines(place):
    return [line for line in (place / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def test_a_run_names_its_parts_with_their_versions(run):
    found = {(p["kind"], p["name"]): (p["distribution"], p["version"]) for p in run.parts}
    assert found["adapter", "lora"] == ("luthier-lora", "0.1.0")
    assert found["loss", "sft"] == found["callback", "jsonl"] == ("luthier", luthier.__version__)
    assert {kind for kind, _ in found} == {"adapter", "loss", "optimizer", "quantizer", "provider", "callback"}


def test_a_run_holds_its_model_and_tokenizer(run):
    assert sum(p.numel() for p in run.model.parameters() if p.requires_grad) > 0
    assert run.tokenizer.chat_template


def test_what_is_written_as_json_is_the_whole_result(run):
    document = json.loads(json.dumps(run.to_dict()))
    assert document["loss_history"] == run.loss_history
    assert document["output_path"] == str(run.output_path)


def test_evaluating_a_run_again_gives_the_numbers_it_ended_with(run, rows):
    assert run.evaluate() == run.evaluate(rows[:4]) == run.eval_metrics


def test_a_run_is_evaluated_on_other_rows_and_files(run, rows, data_file):
    assert run.evaluate(rows) == run.evaluate(data_file) == run.evaluate(str(data_file))
    assert run.evaluate(rows)["eval_loss"] != run.eval_loss


def test_evaluating_a_run_without_held_out_rows_says_what_to_do(train):
    with pytest.raises(LuthierError, match="evaluate") as caught:
        train(max_steps=1).evaluate()
    assert caught.value.code == "data-empty"


def test_a_run_generates_from_a_text_or_messages_the_same_each_time(run):
    answer = run.generate(QUESTION, max_new_tokens=6)
    assert answer == run.generate(QUESTION[0]["content"], max_new_tokens=6)
    sampled = {run.generate(QUESTION, max_new_tokens=8, temperature=2.0, seed=seed) for seed in (0, 0, 1, 2)}
    assert 2 <= len(sampled) <= 3


def test_a_saved_adapter_is_found_by_plain_peft(run, tmp_path, model_folder, logits):
    peft = pytest.importorskip("peft")
    folder = run.save(tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder)
    tokens = torch.arange(10, 30)[None]
    found = plain.eval()(tokens, attention_mask=torch.ones_like(tokens)).logits[0].detach()
    torch.testing.assert_close(found, logits(run.model), rtol=1e-6, atol=1e-6)


def test_a_merged_model_is_found_by_plain_transformers_with_its_tokenizer(run, tmp_path, logits):
    folder = run.save(tmp_path / "merged", merged=True)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folder)), logits(run.model), rtol=1e-5, atol=1e-5
    )
    assert AutoTokenizer.from_pretrained(folder).chat_template == run.tokenizer.chat_template
    assert run.merge() == run.output_path / "merged"


def test_a_run_saved_over_something_else_leaves_it_alone(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(LuthierError) as caught:
        run.save(tmp_path)
    assert caught.value.code == "run-folder-other"
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_the_functions_take_a_run_or_its_artifacts(run, tmp_path, logits):
    merged = luthier.merge(run.output_path, tmp_path / "merged")
    answers = {luthier.generate(p, QUESTION, max_new_tokens=6) for p in (run.output_path, run.artifact, str(merged))}
    assert answers == {run.generate(QUESTION, max_new_tokens=6)}
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(merged)), logits(run.model), rtol=1e-5, atol=1e-5
    )


def test_a_finished_run_is_found_again_by_another_process_with_all_its_numbers(train):
    first = train(max_steps=2)
    again = train(max_steps=2)
    assert again.to_dict() == first.to_dict()
    assert again.generate(QUESTION, max_new_tokens=4) == first.generate(QUESTION, max_new_tokens=4)


def test_a_plan_says_what_a_run_would_be_and_writes_nothing(model_folder, data_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = luthier.plan(model=str(model_folder), data=str(data_file), adapter=Lora(r=4), global_batch_size=8)
    parameters, memory = plan.parameters["all"], plan.memory
    assert parameters["trainable"] == plan.parameters["adapter"]["total"] == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert plan.schedule["total_steps"] == 3
    assert 0 <= memory["gradients"] <= 4 * parameters["trainable"]
    assert memory["weights"] >= 4 * parameters["total"]
    assert memory["total"] == sum(size for cause, size in memory.items() if cause != "total")
    assert 0 < plan.packing["efficiency"] <= 1
    assert plan.parts[0]["distribution"] == "luthier-lora"
    json.dumps(plan.to_dict())
    assert list(tmp_path.iterdir()) == []


def test_an_inspection_shows_what_is_supervised(model_folder, data_file, rows):
    found = luthier.inspect(model=str(model_folder), data=str(data_file), rows=2)
    supervised = ["".join(text for text, on in example.pieces if on) for example in found.examples]
    assert supervised == [row["messages"][1]["content"] + "</s>" for row in rows[:2]]
    assert 0 < found.supervised_share < 1
    json.dumps(found.to_dict())


def test_a_recipe_file_trains_with_overrides_as_keywords(train, tmp_path, model_folder, data_file):
    recipe = {
        "model": str(model_folder),
        "data": str(data_file),
        "adapter": {"name": "lora", "r": 2},
        "exact_callbacks": ["jsonl"],
        "global_batch_size": 8,
        "output_dir": "from-file",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    plain = luthier.train(path)
    assert plain.output_path == tmp_path / "from-file"
    changed = luthier.train(path, adapter=Lora(r=4), learning_rate=1e-2, output_dir=tmp_path / "changed")
    by_keywords = train(adapter=Lora(r=4))
    assert plain.loss_history != changed.loss_history == by_keywords.loss_history
    read = luthier.Recipe.load(path)
    assert luthier.train(read, output_dir=tmp_path / "object").loss_history == plain.loss_history
    assert luthier.train(recipe, output_dir=tmp_path / "mapping").loss_history == plain.loss_history


def test_a_finished_run_on_objects_is_whole_again_with_the_same_objects(model_folder, rows, tmp_path):
    def trained(data):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        model.config._name_or_path = ""  # made in code: no name that another process could load it by
        given = {
            "model": model,
            "tokenizer": AutoTokenizer.from_pretrained(model_folder),
            "data": data,
            "eval_data": rows[:4],
        }
        return luthier.train(
            **given, adapter=Lora(r=4), output_dir=tmp_path / "run", exact_callbacks=["jsonl"], max_steps=2
        )

    first, again = trained(rows), trained(rows)
    assert again.run_id == first.run_id
    assert again.evaluate() == first.eval_metrics
    assert again.generate(QUESTION, max_new_tokens=4) == first.generate(QUESTION, max_new_tokens=4)
    with expect_error("model-not-found", "python:LlamaForCausalLM"):
        luthier.generate(first.output_path, QUESTION)
    assert luthier.generate(first.output_path, QUESTION, base=str(model_folder), max_new_tokens=4)
    with pytest.raises(LuthierError) as caught:
        trained(rows[:12])
    assert caught.value.code == "data-changed"


def test_rows_come_in_any_shape_that_datasets_has(train, rows, tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(rows)
    shapes = [rows, tuple(rows), iter(rows), dataset, dataset.to_iterable_dataset()]
    found = [train(data=data, max_steps=1, output_dir=tmp_path / str(i)).loss_history for i, data in enumerate(shapes)]
    assert all(losses == found[0] for losses in found)
    with pytest.raises(LuthierError, match="choose a split"):
        train(data=datasets.DatasetDict(train=dataset))


def test_a_part_written_in_the_script_needs_no_plugin(train):
    class Half:
        """SGD at half the rate, by a scale of each group."""

        def build(self, groups):
            settings = [{"params": g.parameters, "lr_scale": g.lr_scale / 2, "weight_decay": 0.0} for g in groups]
            return torch.optim.SGD(settings, lr=1.0)

        def evaluating(self):
            import contextlib

            return contextlib.nullcontext()

    run = train(optimizer=Half(), num_train_epochs=2)
    assert run.loss_history[-1] < run.loss_history[0]
    assert next(p for p in run.parts if p["kind"] == "optimizer")["distribution"] is None


WRONG = [
    ({"prompt": [{"rle": "user", "content": "1?"}]}, ("prompt[0]",)),
    ({"prompt": ["1?"]}, ("prompt[0]", "'1?'")),
    ({"prompt": 3}, ("prompt[0]",)),
    ({"max_new_tokens": 0}, ("max_new_tokens", "0", "1")),
    ({"temperature": -1.0}, ("temperature",)),
    ({"temperature": 1.0, "top_p": 1.5}, ("top_p", "0", "1")),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_generating_from_something_else_is_refused(run, given, said):
    with pytest.raises(LuthierError) as caught:
        run.generate(**{"prompt": "1?", **given})
    assert all(fact in str(caught.value) for fact in said)
