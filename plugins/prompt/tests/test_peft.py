"""Real PEFT as the reference: values and gradients under packing, files both ways."""

import json

import pytest
import torch
from luthier.testing.exactness import unrounded
from luthier.testing.worlds import random_batch, tiny_model, tiny_tokenizer
from luthier_prompt import PrefixTuning, PromptTuning, PTuningV2, options_of
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

OPTIONS = {
    "prompt": PromptTuning(num_virtual_tokens=5),
    "prefix": PrefixTuning(num_virtual_tokens=5, init_std=0.7),
    "encoded": PTuningV2(num_virtual_tokens=5, init_std=0.7, encoder_hidden_size=6),
}
QUICK = {("prompt", "gemma2"), ("prefix", "llama"), ("encoded", "gpt2")}
CASE = pytest.mark.parametrize(
    ("name", "architecture"),
    [
        pytest.param(name, architecture, marks=[] if (name, architecture) in QUICK else pytest.mark.slow)
        for name in OPTIONS
        for architecture in ("llama", "gemma2", "gpt2", "mistral", "qwen2", "phi3")
    ],
)
FOURS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
PEFTS = {
    "prompt": (PromptTuningConfig(**FOURS), PromptTuning),
    "p-tuning": (PromptEncoderConfig(**FOURS, encoder_hidden_size=7), PromptTuning),
    "prefix": (PrefixTuningConfig(**FOURS), PrefixTuning),
    "encoded prefix": (PrefixTuningConfig(**FOURS, prefix_projection=True, encoder_hidden_size=7), PrefixTuning),
}


def in_peft(options, adapter, architecture):
    """PEFT's model of the same options with the numbers of ours, its parameters and ours."""
    base = tiny_model(architecture, attn_implementation="eager").double()
    given = {"task_type": "CAUSAL_LM", "num_virtual_tokens": options.num_virtual_tokens}
    if isinstance(options, PromptTuning):
        config = PromptTuningConfig(**given)
    elif isinstance(options, PTuningV2):
        config = PrefixTuningConfig(**given, prefix_projection=True, encoder_hidden_size=options.encoder_hidden_size)
    else:
        config = PrefixTuningConfig(**given)
    model = get_peft_model(base, config).double().eval()
    parameters = [p for name, p in model.named_parameters() if "prompt_encoder" in name]
    own = [p for group in adapter.groups() for p in group.parameters]
    for parameter, value in zip(parameters, own, strict=True):
        parameter.data.copy_(value.data)
    return model, parameters, own


@CASE
def test_values_and_gradients_are_those_of_peft_on_separate_documents(attached, scores, separately, name, architecture):
    model, adapter = attached(OPTIONS[name], architecture, torch.float64)
    theirs, parameters, own = in_peft(OPTIONS[name], adapter, architecture)
    batch = random_batch((7, 12, 4), supervised=1.0)
    found = scores(model, adapter, batch)
    with unrounded():
        expected = separately(theirs, batch)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    found.exp().sum().backward()
    (expected.exp().sum() - 3).backward()
    for ours, other in zip(own, parameters, strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-9, atol=1e-10)
        assert ours.grad.any()


@CASE
def test_our_folder_gives_the_same_values_in_plain_peft(attached, scores, separately, tmp_path, name, architecture):
    model, adapter = attached(OPTIONS[name], architecture)
    adapter.save(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {"prompt_embeddings"}
    base = tiny_model(architecture, attn_implementation="eager")
    batch = random_batch((7, 12, 4), supervised=1.0)
    with torch.no_grad():
        theirs = separately(PeftModel.from_pretrained(base, tmp_path).eval(), batch)
        torch.testing.assert_close(scores(model, adapter, batch), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 20])
def test_a_text_to_begin_with_gives_the_table_of_peft(attached, tmp_path, rows):
    text = "Add the numbers."
    tokenizer = tiny_tokenizer()  # without a first token of its own, which PEFT would take into the prompt
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.save_pretrained(tmp_path)
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=rows, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(tmp_path),
    )  # fmt: skip
    theirs = get_peft_model(tiny_model(), config).prompt_encoder["default"].embedding.weight
    ours = attached(PromptTuning(num_virtual_tokens=rows, init="text", init_text=text))[1].table.whole()
    assert 3 < len(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]) < 20
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("config", "kind"), PEFTS.values(), ids=PEFTS.keys())
def test_pefts_folder_gives_the_same_values_in_ours(attached, scores, separately, tmp_path, config, kind):
    torch.manual_seed(3)
    theirs = get_peft_model(tiny_model(attn_implementation="eager"), config).eval()
    theirs.save_pretrained(tmp_path)
    options = options_of(tmp_path)
    assert (type(options), options.num_virtual_tokens) == (kind, 4)
    model, adapter = attached(options)
    adapter.load(tmp_path)
    batch = random_batch((7, 12, 4), supervised=1.0)
    with torch.no_grad():
        expected = separately(theirs, batch)
        torch.testing.assert_close(scores(model, adapter, batch), expected, rtol=1e-4, atol=1e-5)


def test_the_configuration_has_no_field_that_peft_does_not_know(attached, tmp_path):
    for name, config in (("prompt", PromptTuningConfig), ("encoded", PrefixTuningConfig)):
        attached(OPTIONS[name])[1].save(tmp_path)
        raw = json.loads((tmp_path / "adapter_config.json").read_text())
        assert raw.keys() <= config(task_type="CAUSAL_LM").to_dict().keys()
