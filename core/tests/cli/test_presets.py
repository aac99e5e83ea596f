"""`luthier presets`: known models, their sizes, and what training them takes."""

import json

import pytest
from luthier.memory import model_presets as table
from luthier.memory.model_presets import METHODS, count, list_presets, measure

# what the models' own pages give: the numbers of their safetensors files, tied heads once
KNOWN = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-3-1b-pt": 999_885_952,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
}


def test_every_preset_has_the_parameters_that_its_model_is_known_to_have():
    assert {preset.name: preset.parameters for preset in list_presets()} == KNOWN
    assert {preset.name: count(preset.config) for preset in list_presets()} == KNOWN


def test_weights_gradients_and_states_are_in_what_full_training_takes():
    for preset in list_presets():
        assert preset.needs("full", 0) > 15 * preset.parameters  # float32: weights, gradients, two states
        assert preset.needs("lora", 0) > 2 * preset.parameters
        assert preset.needs("lora", 4096) > preset.needs("lora, recomputed", 4096)
        assert preset.needs("full", 8192) > preset.needs("full", 4096)


def test_the_table_is_written_anew_from_its_configs(tmp_path, monkeypatch):
    small = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
    }
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    entry = {"license": "MIT", "parameters": 0, "config": small, "memory": {}}
    (tmp_path / "table.json").write_text(json.dumps({"a/small": entry, "a/other": entry}))
    monkeypatch.setattr(table, "FILE", tmp_path / "table.json")
    table.renew(["a/small"])
    found = {preset.name: preset for preset in list_presets()}
    assert found["a/small"].parameters == count(small)
    assert all(found["a/small"].needs(method, 4096) > found["a/small"].needs(method, 0) > 0 for method in METHODS)
    assert not found["a/other"].memory


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", list_presets()[::5], ids=lambda p: p.name)
def test_what_the_table_says_is_what_a_rehearsal_says_now(preset, method):
    fixed, each = measure(preset.config, METHODS[method])
    assert fixed + 4096 * each == pytest.approx(preset.needs(method, 4096), rel=0.1)


def test_the_list_is_readable_and_marks_what_fits(luthier):
    result = luthier("presets", "--memory", "24")
    assert result.status == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines) <= 100
    line = next(line for line in lines if "Llama-3.1-8B" in line)
    assert "8.03B" in line
    assert line.count("*") == sum(presets_named("Llama-3.1-8B").needs(m, 4096) <= 24 * 2**30 for m in METHODS)
    assert "24.0 GiB" in result.stdout
    assert "gradient_checkpointing" in result.stdout


def presets_named(name):
    return next(preset for preset in list_presets() if name in preset.name)


def test_the_document_has_every_number(luthier):
    found = luthier("presets", "qwen3-0.6b", "--tokens", "1000", "--json").document
    (row,) = found["presets"]
    assert found["tokens"] == 1000
    assert row["parameters"] == 596_049_920
    assert row["config"]["num_hidden_layers"] == 28
    assert row["license"] == "Apache-2.0"
    assert row["memory"] == {m: presets_named("Qwen3-0.6B").needs(m, 1000) for m in METHODS}
    assert row["fits"] == {m: size <= found["device"]["free"] for m, size in row["memory"].items()}


def test_a_name_that_none_has_is_an_error_with_the_nearest(luthier):
    error = luthier("presets", "Qwen/Qwen3-7B", "--json").document["error"]
    assert error["code"] == "usage"
    assert "Qwen/Qwen3-8B" in error["remedy"] or "Qwen/Qwen3-4B" in error["remedy"]


def test_without_torch_the_list_is_there_and_nothing_is_marked(bare):
    result = bare("presets", "--json")
    assert result.returncode == 0, result.stderr
    assert '"fits": null' in result.stdout
