"""PEFT's files, both ways, and what of the base may train beside the adapter."""

import copy
import json
import warnings

import pytest
import torch
from luthier import PEFT_CONFIG as CONFIG
from luthier import PEFT_WEIGHTS as WEIGHTS
from luthier import LuthierError
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model
from luthier_peft.options import to_config
from peft import PeftModel
from safetensors.torch import load_file, save_file

from .conftest import World, distance, every_method, fitting, outputs


def plain(base, folder):
    """The outputs that plain PEFT gives with this folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return outputs(PeftModel.from_pretrained(copy.deepcopy(base), folder))


@pytest.mark.parametrize("method", every_method())
def test_plain_peft_loads_what_we_save(method, tmp_path):
    world = World(fitting(method))
    world.train(4)
    world.part.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    assert distance(plain(world.base, tmp_path), world.outputs()) < 1e-6


@pytest.mark.parametrize("method", every_method())
def test_we_load_what_plain_peft_saves(method, tmp_path):
    base = tiny_model()
    fixed = {"total_step": 10} if method == "adalora" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        handle = PeftModel(copy.deepcopy(base), to_config(fitting(method), **fixed))
        with torch.no_grad():
            for parameter in handle.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        handle.save_pretrained(tmp_path, save_embedding_layers=False)
    world = World(fitting(method))
    world.part.load(tmp_path)
    assert distance(world.outputs(), outputs(handle)) < 1e-6


def test_no_file_asks_the_hub(tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    world = World(fitting("lora"))
    world.model.name_or_path = "someone/some-model"
    world.part.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "someone/some-model"
    world.part.load(tmp_path)


def test_the_same_adapter_writes_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        World(fitting("lora", target_modules=["v_proj", "k_proj", "q_proj"])).part.save(tmp_path / name)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["target_modules"] == ["k_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_train_are_saved_disabled_and_merged_with_the_adapter(bias, tmp_path):
    world = World(fitting("lora", bias=bias, target_modules=["q_proj"]), architecture="qwen2")
    roles = {group.role: group for group in world.part.groups()}
    assert set(roles) == {"adapter", "bias"} and roles["bias"].weight_decay == 0.0
    world.train(4, rate=1e-2)
    trained = world.outputs()
    with world.part.disabled():
        assert world.outputs().equal(outputs(world.base))
    assert world.outputs().equal(trained)
    assert distance(trained, outputs(world.base)) > 1e-3
    world.part.save(tmp_path)
    assert distance(plain(world.base, tmp_path), trained) < 1e-6
    fresh = World(fitting("lora", bias=bias, target_modules=["q_proj"]), architecture="qwen2", seed=1)
    fresh.part.load(tmp_path)
    with fresh.part.disabled():
        assert fresh.outputs().equal(outputs(world.base))
    assert distance(fresh.outputs(), trained) < 1e-6
    assert distance(outputs(world.part.merge(world.context)), trained) < 1e-5


def test_modules_to_save_train_whole_and_move_with_the_file(tmp_path):
    options = fitting("lora", modules_to_save=["lm_head", "norm"])
    world = World(options)
    groups = {group.role: group.names for group in world.part.groups()}
    assert groups["head"] == ["lm_head.modules_to_save.default.weight"]
    assert any(name.startswith("model.norm.") for name in groups["norm"])
    world.train(3, rate=1e-2)
    trained = world.outputs()
    with world.part.disabled():
        assert world.outputs().equal(outputs(world.base))
    world.part.save(tmp_path)
    assert distance(plain(world.base, tmp_path), trained) < 1e-6
    fresh = World(options, seed=1)
    fresh.part.load(tmp_path)
    assert distance(fresh.outputs(), trained) < 1e-6
    assert distance(outputs(world.part.merge(world.context)), trained) < 1e-5


def test_an_adapter_on_the_head_gets_a_gradient_and_is_saved(tmp_path):
    world = World(fitting("lora", target_modules=["q_proj", "lm_head"]))
    world.train(2)
    head = [p for n, p in zip(world.part.groups()[0].names, world.parameters) if "lm_head" in n]
    assert len(head) == 2 and all(p.grad.any() for p in head)
    world.part.save(tmp_path)
    assert distance(plain(world.base, tmp_path), world.outputs()) < 1e-6


def test_an_adapter_on_the_embedding_saves_the_adapter_alone(tmp_path):
    world = World(fitting("lora", target_modules=["embed_tokens"]))
    world.train(3)
    world.part.save(tmp_path)
    assert all("lora_embedding" in name for name in load_file(tmp_path / WEIGHTS))
    assert distance(plain(world.base, tmp_path), world.outputs()) < 1e-6


def damaged(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path):
    world = World(fitting("lora"))
    world.part.save(tmp_path)
    damaged(tmp_path, lambda t: t.pop(sorted(t)[0]))
    with expect_error("artifact-mismatch", str(tmp_path), "1") as caught:
        world.part.load(tmp_path)
    assert caught.value.code == "artifact-mismatch" and "lora_A" in caught.value.found


def test_a_file_with_a_tensor_too_many_is_refused(tmp_path):
    world = World(fitting("lora"))
    world.part.save(tmp_path)
    damaged(tmp_path, lambda t: t.update({"base_model.model.other.lora_A.weight": torch.zeros(2, 2)}))
    with expect_error("artifact-mismatch", str(tmp_path)):
        world.part.load(tmp_path)


def test_a_file_of_another_shape_is_refused(tmp_path):
    World(fitting("lora", r=4, lora_alpha=8)).part.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "r": 8}))
    with expect_error("artifact-mismatch", str(tmp_path)):
        World(fitting("lora")).part.load(tmp_path)


def test_a_file_of_other_options_is_refused_and_says_which(tmp_path):
    World(fitting("lora", lora_alpha=32)).part.save(tmp_path)
    with pytest.raises(LuthierError, match=r"lora_alpha 8") as caught:
        World(fitting("lora")).part.load(tmp_path)
    assert caught.value.code == "artifact-mismatch" and caught.value.found == {"lora_alpha": 32}


def test_options_of_training_may_differ_from_the_file(tmp_path):
    world = World(fitting("lora", lora_dropout=0.5, init_lora_weights="gaussian"))
    world.train(2)
    world.part.save(tmp_path)
    fresh = World(fitting("lora", target_modules=r".*\.(q|v)_proj"))
    fresh.part.load(tmp_path)
    assert distance(fresh.outputs(), world.outputs()) < 1e-6


def test_a_file_of_another_method_is_refused(tmp_path):
    World(fitting("loha")).part.save(tmp_path)
    with expect_error("artifact-mismatch", str(tmp_path)):
        World(fitting("lokr")).part.load(tmp_path)


def test_an_empty_folder_is_not_looked_up_on_the_hub(tmp_path):
    with expect_error("artifact-not-found", str(tmp_path), CONFIG) as caught:
        World(fitting("lora")).part.load(tmp_path)
    assert caught.value.code == "artifact-not-found"


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_damaged_file_is_named(tmp_path, file):
    world = World(fitting("lora"))
    world.part.save(tmp_path)
    (tmp_path / file).write_bytes(b"{]")
    with expect_error("file-damaged", file):
        world.part.load(tmp_path)


def test_state_of_another_adapter_is_refused():
    state = World(fitting("lora", target_modules=["q_proj"])).part.state()
    with expect_error("checkpoint-corrupt", "adapter peft.lora") as caught:
        World(fitting("lora")).part.load_state(state)
    assert caught.value.code == "checkpoint-corrupt"


def test_a_broken_adapter_is_not_merged():
    world = World(fitting("lora"))
    with torch.no_grad():
        world.parameters[0][0] = float("nan")
    with pytest.raises(LuthierError, match="NaN") as caught:
        world.part.merge(world.context)
    assert caught.value.code == "artifact-unmergeable" and caught.value.found == world.part.groups()[0].names[0]
