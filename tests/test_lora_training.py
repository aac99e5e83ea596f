"""LoRA through `luthier.train`: the trajectory is that of the global batch, and every way to name a part is the same."""

import luthier
import pytest
import torch
from luthier import LossOutput, LuthierError
from luthier_lora import Dora, Lora
from transformers import AutoModelForCausalLM, AutoTokenizer

ADAPTERS = {
    "lora": {"name": "lora", "target_modules": "all-linear", "lora_dropout": 0.0},
    "dora": {"name": "dora", "target_modules": "all-linear", "lora_dropout": 0.0},
}
CUTS = {
    "smaller micro-batches": {"max_tokens_per_device": 60},
    "no packing": {"packing": False},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_tokens_per_device": 47},
}
PRECISIONS = [("float64", 1e-10), ("float32", 1e-5)]


def trained(run):
    """Every trained weight, in one vector."""
    return torch.cat([p.detach().flatten().double() for p in run.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_how_the_global_batch_is_cut_does_not_change_the_trajectory(
    train, tmp_path, model_folder, adapter, dtype, bound
):
    model = {"name_or_path": str(model_folder), "dtype": dtype}
    shared = {
        "model": model,
        "adapter": ADAPTERS[adapter],
        "optimizer": {"name": "sgd", "momentum": 0.9},
        "num_train_epochs": 2,
    }
    whole = train(**shared, output_dir=tmp_path / "whole")
    assert whole.loss_history[-1] < whole.loss_history[0]
    for name, cut in CUTS.items():
        other = train(**shared, **cut, output_dir=tmp_path / name)
        torch.testing.assert_close(trained(other), trained(whole), rtol=bound, atol=bound, msg=name)
        assert other.loss_history == pytest.approx(whole.loss_history, rel=bound), name


class Focal:
    """A loss of the caller's: tokens that the model knows already count less (Lin et al. 2017, gamma 1)."""

    data = "tokens"

    def terms(self, batch):
        return {"focal": float(len(batch.supervised))}

    def __call__(self, policy, batch):
        logprobs = policy.token_logprobs(batch)
        total = -((1 - logprobs.exp()) * logprobs)[batch.supervised].sum()
        return LossOutput(
            sums={"focal": total}, metrics={"sure": (logprobs.exp()[batch.supervised].sum(), len(batch.supervised))}
        )


def test_a_loss_written_in_the_script_trains_an_installed_adapter(train, tmp_path, data_file):
    run = train(loss=Focal(), eval_data=str(data_file))
    assert run.loss_history[-1] < run.loss_history[0]
    assert run.eval_metrics["eval_sure"] > 0
    assert run.loss_history[0] < train(output_dir=tmp_path / "sft").loss_history[0]
    loss = next(part for part in run.parts if part["kind"] == "loss")
    assert loss["name"].endswith("Focal")
    assert loss["distribution"] is None


def test_ranks_that_were_chosen_by_the_rows_are_those_of_the_files(train):
    run = train(adapter={"name": "lora", "rank_budget": 800, "rank_gradient": 1, "lora_dropout": 0.0}, max_steps=2)
    assert luthier.generate(run.output_path, "3 and", max_new_tokens=4) == run.generate("3 and", max_new_tokens=4)


def test_an_options_object_names_its_part(train, tmp_path):
    by_object = train(adapter=Lora(r=4, lora_dropout=0.0), output_dir=tmp_path / "object")
    by_name = train(adapter={"name": "lora", "r": 4, "lora_dropout": 0.0}, output_dir=tmp_path / "name")
    assert by_object.loss_history == by_name.loss_history
    assert torch.equal(trained(by_object), trained(by_name))
    assert train(adapter=Dora(r=2), output_dir=tmp_path / "dora").parts[0]["name"] == "dora"


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_loaded_model_with_its_tokenizer_trains_as_its_folder_does(train, tmp_path, model_folder):
    by_folder = train(output_dir=tmp_path / "folder")
    (model, tokenizer), pair = loaded(model_folder), loaded(model_folder)
    by_object = train(model=model, tokenizer=tokenizer, output_dir=tmp_path / "object")
    by_pair = train(model=pair, output_dir=tmp_path / "pair")
    assert by_object.loss_history == by_pair.loss_history == by_folder.loss_history
    assert by_object.model is model
    assert by_object.tokenizer is tokenizer


def test_a_model_that_was_trained_can_be_called_by_its_owner(train, model_folder):
    model, tokenizer = loaded(model_folder)
    train(model=model, tokenizer=tokenizer)
    inputs = tokenizer("3 and 3?", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs.input_ids.shape[1]


def test_a_loaded_model_without_its_tokenizer_is_refused(train, model_folder):
    with pytest.raises(LuthierError, match="tokenizer") as caught:
        train(model=AutoModelForCausalLM.from_pretrained(model_folder))
    assert caught.value.code == "recipe-missing"


def test_functions_watch_a_run(train, tmp_path, data_file):
    steps, saves, losses = [], [], []
    watch = luthier.on(
        step_end=lambda step, metrics: (steps.append(step), losses.append(metrics["loss"])),
        saved=lambda path: saves.append(path.name),
        completed=lambda result: steps.append(result.run_id),
    )
    run = train(exact_callbacks=[watch], save_steps=2, eval_data=str(data_file))
    assert steps == [1, 2, 3, run.run_id]
    assert losses == run.loss_history
    assert saves == ["step-00000002", "step-00000003"]


def test_a_callback_stops_a_run_which_is_then_complete(train):
    watch = luthier.on(step_end=lambda run, step: run.request_stop("enough") if step == 2 else None)
    run = train(exact_callbacks=[watch], num_train_epochs=4)
    assert (run.steps, run.stop_reason) == (2, "enough")
    assert run.artifact.is_dir()
