"""Real PEFT as the reference: files both ways, outputs, gradients, in every architecture."""

import json

import pytest
import torch
from luthier.testing.worlds import ARCHITECTURES, tiny_model
from luthier_lora import Dora, Lora, options_of
from luthier_lora.adapter import LoraAdapter

ALL = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
FORMS = {
    "default": Lora(lora_dropout=0.0),
    "rslora": Lora(lora_dropout=0.0, r=6, use_rslora=True, target_modules="all-linear"),
    "dora": Dora(lora_dropout=0.0, target_modules="all-linear"),
    "rsdora": Dora(lora_dropout=0.0, r=3, use_rslora=True),
}
FORM = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS.keys())
EXPERTS = {
    "experts": Lora(lora_dropout=0.0, target_modules=[], target_parameters=["gate_up_proj", "experts.down_proj"]),
    "experts, q and v": Lora(lora_dropout=0.0, r=3, use_rslora=True, target_parameters=["mlp.experts.down_proj"]),
    "experts and router": Lora(lora_dropout=0.0, target_parameters=["gate_up_proj", "mlp.gate.weight"]),
}


@pytest.fixture(scope="module")
def peft():
    import warnings

    warnings.filterwarnings("ignore", module="peft")
    import peft

    return peft


@pytest.fixture
def loaded(peft):
    """A folder's adapter on a fresh base model, by PEFT."""

    def load(folder, architecture, train=False, dtype=torch.float32):
        return peft.PeftModel.from_pretrained(tiny_model(architecture).to(dtype), folder, is_trainable=train)

    return load


def named(model):
    """PEFT's trainable parameters under the names that they have in its files."""
    names = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    return {name.replace("magnitude_vector.weight", "magnitude_vector"): p for name, p in names.items()}


def close(ours, theirs, within=1e-6):
    """Equal within a share of the largest."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=within * max(1.0, theirs.abs().max().item()))


def float32_bound(options):
    """LoRA is PEFT's arithmetic to the bit; DoRA's norm is the same sum in another order (see the float64 test)."""
    return 5e-6 if isinstance(options, Dora) else 1e-6


def config_of(options, peft, architecture, **changes):
    """The same adapter in PEFT's own configuration. PEFT's all-linear takes experts, so that layers are named."""
    shared = {name: getattr(options, name) for name in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    names = sorted(targets_of(architecture, options).layers)
    parameters = getattr(options, "target_parameters", None)
    return peft.LoraConfig(
        **shared,
        use_dora=isinstance(options, Dora),
        target_modules=names,
        target_parameters=parameters,
        init_lora_weights=False,
        **changes,
    )


def targets_of(architecture, options):
    from luthier_lora.targets import find_targets

    return find_targets(tiny_model(architecture), options)


@ALL
@FORM
def test_our_folder_gives_the_same_outputs_in_plain_peft(attached, loaded, logits, tmp_path, architecture, options):
    model, adapter = attached(options, architecture, shake=0.05)
    adapter.save(tmp_path)
    close(logits(model), logits(loaded(tmp_path, architecture)), float32_bound(options))


@pytest.mark.parametrize(
    "architecture", sorted(set(ARCHITECTURES) - {"mixtral"})
)  # no float64 grouped experts in torch
@FORM
def test_in_float64_outputs_and_gradients_are_pefts_far_below_rounding(
    attached, loaded, tokens, tmp_path, architecture, options
):
    model, adapter = attached(options, architecture, shake=0.05, dtype=torch.float64)
    adapter.save(tmp_path)
    adapter.load(tmp_path)  # the file's float32
    theirs = loaded(tmp_path, architecture, train=True, dtype=torch.float64).train()
    outputs = [one(tokens, labels=tokens) for one in (model, theirs)]
    close(outputs[0].logits, outputs[1].logits, 1e-12)
    for output in outputs:
        output.loss.backward()
    expected = named(theirs)
    for group in adapter.groups():
        for name, parameter in zip(group.names, group.parameters, strict=True):
            close(parameter.grad, expected[f"base_model.model.{name}"].grad, 1e-12)


@ALL
@FORM
def test_pefts_folder_gives_the_same_outputs_in_ours(attached, peft, logits, tmp_path, architecture, options):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(tiny_model(architecture), config_of(options, peft, architecture))
    with torch.no_grad():
        for parameter in named(theirs).values():
            parameter.mul_(0.3 + torch.rand_like(parameter))
    theirs.save_pretrained(tmp_path)
    model, adapter = attached(options_of(tmp_path), architecture, shake=0)
    adapter.load(tmp_path)
    close(logits(model), logits(theirs), float32_bound(options))


@ALL
@FORM
def test_gradients_are_pefts(attached, loaded, tokens, tmp_path, architecture, options):
    model, adapter = attached(options, architecture, shake=0.05)
    adapter.save(tmp_path)
    theirs = loaded(tmp_path, architecture, train=True).train()
    for one in (model, theirs):
        one(tokens, labels=tokens).loss.backward()
    expected = {name: parameter.grad for name, parameter in named(theirs).items()}
    assert expected.keys() == adapter.state().keys()
    for group in adapter.groups():
        for name, parameter in zip(group.names, group.parameters, strict=True):
            close(parameter.grad, expected[f"base_model.model.{name}"], float32_bound(options))


@pytest.mark.parametrize("options", EXPERTS.values(), ids=EXPERTS.keys())
def test_experts_are_pefts_in_files_outputs_and_gradients(attached, loaded, tokens, logits, tmp_path, options):
    model, adapter = attached(options, "mixtral", shake=0.05)
    adapter.save(tmp_path)
    theirs = loaded(tmp_path, "mixtral", train=True).train()
    for one in (model, theirs):
        one(tokens, labels=tokens).loss.backward()
    expected = named(theirs)
    assert expected.keys() == adapter.state().keys()
    for group in adapter.groups():
        for name, parameter in zip(group.names, group.parameters, strict=True):
            close(parameter.grad, expected[f"base_model.model.{name}"].grad)
    assert torch.allclose(logits(model), logits(theirs), atol=1e-6)
    assert not torch.allclose(logits(model), logits(tiny_model("mixtral")), atol=1e-2)


@pytest.mark.parametrize("options", EXPERTS.values(), ids=EXPERTS.keys())
def test_pefts_experts_load_in_ours(attached, peft, logits, tmp_path, options):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(tiny_model("mixtral"), config_of(options, peft, "mixtral"))
    theirs.save_pretrained(tmp_path)
    model, adapter = attached(options_of(tmp_path), "mixtral", shake=0)
    adapter.load(tmp_path)
    close(logits(model), logits(theirs))


def test_transposed_experts_of_gpt_oss_are_pefts(peft, context, tmp_path):
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}

    def base():
        torch.manual_seed(0)
        config = transformers.GptOssConfig(**sizes, layer_types=["full_attention"], attn_implementation="eager")
        return transformers.GptOssForCausalLM(config)

    options = Lora(
        r=2,
        lora_dropout=0.0,
        init_lora_weights=False,
        target_modules=[],
        target_parameters=["down_proj", "gate_up_proj"],
    )
    adapter = LoraAdapter(options)
    model = adapter.attach(base(), context()).eval()
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        close(model(tokens).logits, theirs(tokens).logits)
        assert not torch.allclose(model(tokens).logits, base().eval()(tokens).logits, atol=1e-4)
        outputs = model(tokens).logits
        torch.testing.assert_close(adapter.merge(context())(tokens).logits, outputs, atol=1e-5, rtol=0)


def test_configuration_reads_as_peft_writes_it(attached, peft, base_folder, tmp_path):
    model, adapter = attached(Lora(r=4, lora_alpha=2, target_modules="all-linear"), "gpt2")
    model.config._name_or_path = str(base_folder("gpt2"))
    adapter.save(tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.fan_in_fan_out, config.task_type) == (4, 2, True, "CAUSAL_LM")
    assert set(config.target_modules) == {"c_attn", "c_proj", "c_fc"}
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw.keys() <= {*peft.LoraConfig(task_type="CAUSAL_LM").to_dict()}
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(auto.base_model.model, type(model))


def test_names_are_written_in_full_where_their_ends_are_ambiguous(attached, loaded, logits, tmp_path):
    model, adapter = attached(Lora(target_modules=["0.self_attn.q_proj", "1.mlp.up_proj"], lora_dropout=0.0))
    adapter.save(tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    close(logits(model), logits(loaded(tmp_path, "llama")))
