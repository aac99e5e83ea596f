"""LoRA that begins at what quantizing took from the weights: it is nearer to the exact model, and its files are any adapter's."""

import json

import luthier
import pytest
import torch
from luthier import LuthierError
from luthier.model.attention import generating_attention
from luthier.testing import expect_error
from luthier.testing.worlds import save_tiny_model, tiny_model
from luthier_lora import Lora
from luthier_lora.adapter import LoraAdapter
from luthier_lora.merging import wrappers
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = [{"prompt": f"{i} plus {i} is ", "completion": str(2 * i)} for i in range(8)]
IDS = torch.arange(10, 30)[None]
OPTIONS = {"name": "lora", "r": 8, "target_modules": "all-linear", "init_lora_weights": "loftq"}


def train(folder, output, quantizer="nf4", steps=1, **options):
    return luthier.train(
        model=str(folder), data=ROWS, adapter={**OPTIONS, **options}, quantizer=quantizer, output_dir=output,
        max_steps=steps, learning_rate=1e-12, exact_callbacks=[],
    )  # fmt: skip


def logits(model):
    with generating_attention(model):
        return model(IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits.detach()


def begun(run):
    return {path: (wrapper, wrapper.folded()) for path, wrapper in wrappers(run.model).items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("quantizer", ["nf4", pytest.param("ternary", marks=pytest.mark.slow)])
def test_every_layer_begins_nearer_to_the_exact_weight_by_what_its_rank_can_hold(tmp_path, architecture, quantizer):
    save_tiny_model(tmp_path / "model", architecture)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    layers = begun(train(tmp_path / "model", tmp_path / "run", quantizer))
    assert layers
    for path, (wrapper, weight) in layers.items():
        wanted = exact.get_submodule(path).weight
        wanted = wanted.T if type(exact.get_submodule(path)).__name__ == "Conv1D" else wanted
        lost = wanted - wrapper.base_weight()
        left = torch.linalg.svdvals(lost)[8:].norm()  # Eckart and Young: no update of this rank leaves less
        torch.testing.assert_close((wanted - weight).norm(), left, rtol=1e-3, atol=1e-6)
        assert left < 0.9 * lost.norm()


def test_the_saved_adapter_reopens_without_the_original_weights_and_merges(tmp_path):
    save_tiny_model(tmp_path / "model")
    run = train(tmp_path / "model", tmp_path / "run", steps=2)
    assert json.loads((run.artifact / "adapter_config.json").read_text())["init_lora_weights"] is True
    expected = logits(run.model)
    opened = luthier.load(run.artifact)
    torch.testing.assert_close(logits(opened.model), expected, rtol=0, atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(luthier.merge(run.output_path))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_a_run_that_broke_off_resumes_bit_for_bit(tmp_path):
    save_tiny_model(tmp_path / "model")

    def break_off(step):
        if step == 2:
            raise RuntimeError("power cut")

    settings = {"model": str(tmp_path / "model"), "data": ROWS, "adapter": OPTIONS, "quantizer": "nf4", "max_steps": 4,
                "learning_rate": 1e-2, "save_steps": 1}  # fmt: skip
    straight = luthier.train(**settings, output_dir=tmp_path / "straight")
    with pytest.raises(RuntimeError, match="power cut"):
        luthier.train(**settings, output_dir=tmp_path / "run", exact_callbacks=[luthier.on(step_ended=break_off)])
    resumed = luthier.train(**settings, output_dir=tmp_path / "run")
    assert resumed.loss_history == straight.loss_history


def test_a_model_without_quantized_layers_is_refused_and_so_is_one_without_a_checkpoint(tmp_path):
    save_tiny_model(tmp_path / "model")
    with expect_error("part-unsupported", "adapter.init_lora_weights"):
        train(tmp_path / "model", tmp_path / "run", "none")
    assert not (tmp_path / "run").exists()
    given = tiny_model(), AutoTokenizer.from_pretrained(tmp_path / "model")
    with expect_error("model-not-found", "python:LlamaForCausalLM"):
        luthier.train(
            model=given, data=ROWS, adapter=OPTIONS, quantizer="nf4", max_steps=1, output_dir=tmp_path / "run"
        )


def test_a_layer_that_is_left_exact_begins_as_ever(tmp_path):
    save_tiny_model(tmp_path / "model")
    quantizer = {"name": "nf4", "skip_modules": ["q_proj"]}
    for path, (wrapper, _) in begun(train(tmp_path / "model", tmp_path / "run", quantizer)).items():
        assert bool(wrapper.lora_B.weight.abs().max() > 1e-6) == (not path.endswith("q_proj"))


def test_loftq_of_a_parameter_is_refused():
    with pytest.raises(LuthierError) as caught:
        LoraAdapter(Lora(lora_dropout=0.0, init_lora_weights="loftq", target_parameters=["experts.down_proj"]))
    assert caught.value.where == "init_lora_weights"
