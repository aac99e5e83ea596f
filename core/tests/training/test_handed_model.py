"""The base of an artifact is the base that was trained on: a model handed over is compared with what its config names."""

import json
import shutil

import luthier
import pytest
import torch
import transformers
from luthier import LuthierError
from luthier.recipe.artifact_note import NOTE
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_tokenizer


@pytest.fixture
def model(model_folder):
    return transformers.AutoModelForCausalLM.from_pretrained(model_folder)


def base_of(run):
    return json.loads((run.artifact / NOTE).read_text())["model"]["name_or_path"]


def changed(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    return model


def resized(model):
    model.resize_token_embeddings(model.config.vocab_size + 1, mean_resizing=False)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_as_its_files_have_it_is_named_by_them(dtype, model, model_folder, train):
    run = train(model=model.to(dtype), tokenizer=tiny_tokenizer(), adapter="lora", max_steps=1)
    assert base_of(run) == str(model_folder)


def test_a_model_with_other_numbers_is_an_object_of_python_for_its_artifact(model, train):
    run = train(model=changed(model), tokenizer=tiny_tokenizer(), adapter="lora", max_steps=1)
    assert base_of(run) == "python:LlamaForCausalLM"
    assert run.generate("1?", max_new_tokens=2) is not None
    with expect_error("model-not-found", "python:LlamaForCausalLM"):
        luthier.generate(run.artifact, "1?")


def test_rounded_rotary_frequencies_make_another_model(model, train):
    frequencies = model.model.rotary_emb.original_inv_freq
    frequencies.data = frequencies.data.to(torch.bfloat16).float()
    assert base_of(train(model=model, tokenizer=tiny_tokenizer(), adapter="lora", max_steps=1)).startswith("python:")


@pytest.mark.parametrize("change", [None, changed])
def test_a_model_of_the_hub_is_compared_with_the_files_in_its_cache(
    change, model, model_folder, train, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    kept = tmp_path / "hub/models--maker--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text("0" * 40)
    (kept / "snapshots").mkdir()
    shutil.copytree(model_folder, kept / "snapshots" / ("0" * 40))
    model.config._name_or_path = model.name_or_path = "maker/tiny"
    given = change(model) if change else model
    run = train(model=given, tokenizer=tiny_tokenizer(), adapter="full", max_steps=1)
    assert base_of(run) == ("python:LlamaForCausalLM" if change else "maker/tiny")


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_an_adapter_on_a_resized_model_is_refused_before_training(verb, model, train, tmp_path):
    act = train if verb == "train" else luthier.plan
    rows = {} if verb == "train" else {"data": [{"prompt": "a", "completion": "b"}]}
    with pytest.raises(LuthierError, match=r"\[321, 32\], there \[320, 32\]") as caught:
        act(model=resized(model), tokenizer=tiny_tokenizer(), adapter="lora", max_steps=1, **rows)
    assert caught.value.where == "model" and not (tmp_path / "run").exists()


def test_a_whole_model_may_have_been_resized(model, train):
    run = train(model=resized(model), tokenizer=tiny_tokenizer(), adapter="full", max_steps=1)
    assert base_of(run).startswith("python:")
    assert len(transformers.AutoModelForCausalLM.from_pretrained(run.artifact).get_input_embeddings().weight) == 321


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_model_comes_back_with_its_modes_and_what_took_a_gradient_and_without_any(adapter, model, train):
    model.train()
    model.model.layers[0].eval()
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    run = train(model=model, tokenizer=tiny_tokenizer(), adapter=adapter, max_steps=2)
    assert run.model is model
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
    assert all(parameter.requires_grad == given for parameter, given in wanted)
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_comes_back_as_it_was_from_a_run_that_fails(model, train):
    def explode(step):
        raise ValueError("no")

    model.eval().requires_grad_(False)
    with pytest.raises(ValueError, match="no"):
        train(model=model, tokenizer=tiny_tokenizer(), adapter="full", exact_callbacks=[luthier.on(step_ended=explode)])
    assert not model.training and not any(p.requires_grad or p.grad is not None for p in model.parameters())
