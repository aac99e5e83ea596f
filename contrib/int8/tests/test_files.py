"""An int8 model as files: exported, loaded back, and damaged."""

import json

import pytest
import torch
from luthier import LuthierError
from luthier.testing import expect_error
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from luthier_int8 import Int8, files
from luthier_int8.quantizer import Int8Quantizer
from safetensors import safe_open

IDS = torch.arange(10, 22)[None]


def exported(folder, architecture="llama", dtype=torch.float32, options=None, **changes):
    model = tiny_model(architecture, **changes).eval()
    for parameter in model.parameters():  # as `from_pretrained` does it: rotary tables keep float32
        parameter.data = parameter.data.to(dtype)
    Int8Quantizer(options or Int8()).apply(model, context(model))
    files.export(model, folder)
    return model


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {}), ("gpt_neox", {}), ("mixtral", {})],
)
def test_an_exported_model_comes_back_with_the_same_logits(tmp_path, architecture, changes):
    model = exported(tmp_path, architecture, **changes)
    again = files.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(IDS, use_cache=False).logits, again(IDS, use_cache=False).logits)
    assert {n: t.dtype for n, t in model.state_dict().items()} == {n: t.dtype for n, t in again.state_dict().items()}


def test_group_size_and_the_dtype_of_the_rest_come_back(tmp_path):
    model = exported(tmp_path, dtype=torch.bfloat16, options=Int8(group_size=8, skip_modules=["mlp"]))
    again = files.load(tmp_path)
    layer = again.model.layers[0].self_attn.q_proj
    assert (layer.group_size, tuple(layer.scales.shape), layer.scales.dtype) == (8, (32, 4), torch.float32)
    assert again.lm_head.weight.dtype == again.model.norm.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model(IDS, use_cache=False).logits, again(IDS, use_cache=False).logits)


def test_a_tied_head_comes_back_tied_and_is_written_once(tmp_path):
    exported(tmp_path, tie_word_embeddings=True)
    again = files.load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with safe_open(tmp_path / files.FILE, framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_the_header_says_as_json_which_layers_are_int8(tmp_path):
    exported(tmp_path, "gpt2")
    with safe_open(tmp_path / files.FILE, framework="pt") as file:
        layers = json.loads(file.metadata()["layers"])
        assert file.get_tensor("transformer.h.0.attn.c_attn.weight").dtype == torch.int8
    assert layers["transformer.h.0.attn.c_attn"] == {"group_size": None, "transposed": True}


def test_the_file_is_a_byte_for_each_quantized_weight(tmp_path):
    model = exported(tmp_path, hidden_size=128, intermediate_size=256)
    expected = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert 0 <= (tmp_path / files.FILE).stat().st_size - expected < 8192


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(LuthierError, match=str(tmp_path)) as caught:
        files.load(tmp_path)
    assert caught.value.code == "artifact-not-found"


def test_a_file_cut_short_is_refused(tmp_path):
    exported(tmp_path)
    path = tmp_path / files.FILE
    path.write_bytes(path.read_bytes()[:-100])
    with expect_error("file-damaged", "int8.safetensors"):
        files.load(tmp_path)


def test_another_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / files.FILE)
    with pytest.raises(LuthierError, match="format"):
        files.load(tmp_path)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, change):
    exported(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LuthierError) as caught:
        files.load(tmp_path)
    assert caught.value.code == "artifact-mismatch"
