"""What is loaded is checked: weights that a checkpoint lacks, holds besides, has in another shape, or that are none."""

import json
import shutil

import luthier
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.model import load
from luthier.model.weights.loaded_weights import check_tensors
from luthier.recipe.schema import Model
from luthier.step.opened import open_artifact
from luthier.testing import expect_error
from luthier.testing.worlds import ARCHITECTURES, save_tiny_model, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

NAME = "model.layers.1.mlp.down_proj.weight"


def altered(source, folder, weights=None, **config):
    """A copy of a model's folder with other weights or another config."""
    shutil.copytree(source, folder)
    if weights is not None:
        tensors = load_file(folder / "model.safetensors")
        weights(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def poisoned(value):
    def change(tensors):
        tensors[NAME].view(-1)[7] = value

    return change


BROKEN = {
    "two layers more": ({"num_hidden_layers": 4, "layer_types": None}, None, "lacks model.layers.2.input_layernorm"),
    "a layer fewer": ({"num_hidden_layers": 1, "layer_types": None}, None, "holds, though .* model.layers.1"),
    "one missing": ({}, lambda t: t.pop(NAME), f"lacks {NAME}"),
    "one besides": ({}, lambda t: t.update(extra=torch.zeros(2)), "holds, though .* extra"),
    "another shape": ({}, lambda t: t.update({NAME: torch.zeros(32, 47)}), rf"shape {NAME} \[32, 47\] for \[32, 48\]"),
    "untied, without a head": ({"tie_word_embeddings": False}, lambda t: t.pop("lm_head.weight", 0), "lacks lm_head"),
    "NaN": ({}, poisoned(float("nan")), f"NaN or infinity stands in {NAME}"),
    "infinity": ({}, poisoned(float("-inf")), f"NaN or infinity stands in {NAME}"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_are_not_the_models_are_refused_by_name_before_anything_is_attached(case, model_folder, tmp_path):
    config, weights, told = BROKEN[case]
    folder = altered(model_folder, tmp_path / "broken", weights, **config)
    with pytest.raises(LuthierError, match=told) as caught:
        load.load_model(Model(name_or_path=str(folder)), torch.device("cpu"), {})
    assert caught.value.code == "model-weights" and caught.value.where == str(folder)


@pytest.mark.parametrize("verb", [luthier.plan, luthier.train])
def test_a_checkpoint_without_a_layer_is_refused_before_the_rows_are_read(verb, model_folder, tmp_path):
    folder = altered(model_folder, tmp_path / "broken", num_hidden_layers=4, layer_types=None)
    with pytest.raises(LuthierError, match="lacks") as caught:
        verb(model=str(folder), data="nowhere.jsonl", adapter="lora", output_dir=tmp_path / "run")
    assert caught.value.code == "model-weights" and not (tmp_path / "run").exists()


def test_a_reference_that_lacks_weights_is_refused(train, model_folder, tmp_path):
    folder = altered(model_folder, tmp_path / "broken", lambda t: t.pop(NAME))
    pairs = [{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2
    with pytest.raises(LuthierError, match=NAME) as caught:
        train(data=pairs, loss="dpo", adapter="lora", reference={"model": str(folder)})
    assert caught.value.code == "model-weights"


def test_a_loaded_model_with_nan_is_refused():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(LuthierError, match=f"model: .*{NAME}"):
        luthier.train(model=model, tokenizer=tiny_tokenizer(), data=[{"prompt": "a", "completion": "b"}])


def test_an_adapter_with_nan_is_refused_where_it_is_opened(train, tmp_path):
    artifact = train(adapter="lora", max_steps=1).artifact
    path = artifact / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path)
    with expect_error("model-weights", "adapter") as caught:
        open_artifact(artifact)
    assert caught.value.where == str(artifact)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_checkpoints_of_every_architecture_are_taken(architecture, tmp_path):
    folder = save_tiny_model(tmp_path / "model", architecture)
    load.check_named_model(Model(name_or_path=str(folder)))
    model = load.load_model(Model(name_or_path=str(folder)), torch.device("cpu"), {})
    assert model.config.architectures == [type(model).__name__]


def test_tied_weights_are_not_missing(tmp_path):
    folder = save_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load.load_model(Model(name_or_path=str(folder)), torch.device("cpu"), {})


@settings(max_examples=40)
@given(
    st.lists(st.floats(width=16, allow_nan=True, allow_infinity=True), min_size=1, max_size=6),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]),
)
def test_a_tensor_is_refused_exactly_where_one_of_its_numbers_is_none(numbers, dtype):
    tensor = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    expected = bool(tensor.float().isfinite().all())
    try:
        check_tensors([("empty", torch.zeros(0)), ("whole", torch.zeros(2, dtype=torch.int64)), ("w", tensor)], "here")
    except LuthierError as error:
        assert (error.code, error.where) == ("model-weights", "here") and not expected
    else:
        assert expected
