"""Bases that got rows for new tokens: PEFT's files hold the embedding and head, which are read, or refused by name."""

import json
import warnings

import pytest
import torch
from luthier.testing.worlds import tiny_model
from luthier_lora import Lora, options_of
from luthier_lora.adapter import LoraAdapter
from safetensors.torch import load_file

TOKENS = torch.tensor([[3, 9, 60, 321, 323]])  # two of the four new tokens
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}  # gpt2 is tied
BOTH = pytest.mark.parametrize("architecture", TARGETS)


@pytest.fixture(scope="module")
def peft():
    warnings.filterwarnings("ignore", module="peft")
    import peft

    return peft


def resized(architecture, seed=0):
    model = tiny_model(architecture)
    torch.manual_seed(seed)
    model.resize_token_embeddings(324, mean_resizing=False)
    return model


@pytest.fixture
def saved(peft, tmp_path):
    """PEFT's model on a resized base, and the folder that it wrote with `save_embedding_layers`."""

    def save(architecture, **changes):
        options = {"r": 4, "target_modules": TARGETS[architecture], "init_lora_weights": False, **changes}
        model = peft.get_peft_model(resized(architecture), peft.LoraConfig(**options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens" in name:
                    parameter.add_(0.3)
        model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
        return model, tmp_path / "peft"

    return save


@pytest.fixture
def opened(context):
    def attach(folder, model, options):
        adapter = LoraAdapter(options)
        adapter.attach(model, context())
        adapter.load(folder)
        return model, adapter

    return attach


def plain(architecture, **changes):
    return Lora(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS[architecture], **changes)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@BOTH
@pytest.mark.parametrize("changes", [{}, {"trainable_token_indices": [320, 321]}], ids=["lora", "rows"])
def test_pefts_folder_is_read_on_its_resized_base(saved, opened, logits, architecture, changes):
    theirs, folder = saved(architecture, **changes)
    assert any(len(tensor) == 324 for tensor in load_file(folder / "adapter_model.safetensors").values())
    model, _ = opened(folder, resized(architecture), plain(architecture, **changes))
    close(logits(model, TOKENS), logits(theirs, TOKENS))


@BOTH
def test_its_embedding_and_head_are_read_as_modules_on_another_resized_base_and_come_back_to_peft(
    saved, opened, logits, peft, tmp_path, architecture
):
    theirs, folder = saved(architecture)
    options = options_of(folder)
    assert options.modules_to_save is not None and len(options.modules_to_save) == 2
    model, adapter = opened(folder, resized(architecture, seed=1), options)
    close(logits(model, TOKENS), logits(theirs, TOKENS))
    adapter.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(resized(architecture, seed=2), tmp_path / "ours")
    close(logits(again, TOKENS), logits(theirs, TOKENS))


@BOTH
def test_our_folder_of_a_resized_model_gives_pefts_outputs_on_it(peft, context, logits, tmp_path, architecture):
    model, adapter = resized(architecture), LoraAdapter(plain(architecture, init_lora_weights=False))
    adapter.attach(model, context())
    adapter.save(tmp_path)
    assert "vocab_size" not in json.loads((tmp_path / "adapter_config.json").read_text())
    close(logits(peft.PeftModel.from_pretrained(resized(architecture), tmp_path), TOKENS), logits(model, TOKENS))


@BOTH
def test_on_a_base_of_other_rows_or_numbers_it_is_refused_by_name(saved, opened, refused, architecture):
    _, folder = saved(architecture)
    error = refused(opened, folder, tiny_model(architecture), plain(architecture))
    assert error.code == "artifact-mismatch" and "resize_token_embeddings(324)" in str(error)
    error = refused(opened, folder, resized(architecture, seed=1), plain(architecture))
    assert error.code == "artifact-mismatch" and "modules_to_save" in str(error)


def test_a_head_that_is_adapted_itself_keeps_its_base_and_is_compared_with_it(saved, opened, refused, logits):
    changes = {"target_modules": ["q_proj", "lm_head"]}
    theirs, folder = saved("llama", **changes)
    options = Lora(r=4, lora_alpha=8, lora_dropout=0.0, **changes)
    assert options_of(folder).modules_to_save is None
    close(logits(opened(folder, resized("llama"), options)[0], TOKENS), logits(theirs, TOKENS))
    assert "lm_head.base_layer.weight" in str(refused(opened, folder, resized("llama", seed=1), options))


def test_rows_of_a_tied_head_that_are_not_the_embedding_s_are_refused(saved, opened, refused):
    from safetensors.torch import save_file

    changes = {"trainable_token_indices": [320, 321]}
    _, folder = saved("gpt2", **changes)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.token_adapter.trainable_tokens_delta"] += 1
    save_file(tensors, path)
    error = refused(opened, folder, resized("gpt2"), plain("gpt2", **changes))
    assert error.code == "artifact-mismatch" and "lm_head" in str(error)
