"""Attaching: what is taken, what trains, and that nothing else changes."""

import json
import subprocess
import sys

import attrs
import pytest
import torch
from luthier import Group
from luthier.testing.contexts import context
from luthier.testing.worlds import ARCHITECTURES, tiny_model
from luthier_lora import AdaLora, Dora, Lora
from luthier_lora.adalora import AdaLoraAdapter
from luthier_lora.adapter import LoraAdapter
from torch import nn
from transformers.pytorch_utils import Conv1D

FUSED = {"phi3": {"qkv_proj"}, "gpt2": {"c_attn"}, "gpt_neox": {"query_key_value"}}
ALL = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
BOTH = pytest.mark.parametrize("options", [Lora(), Dora()], ids=["lora", "dora"])


def ends(adapter):
    return {name.rpartition(".")[2] for name in adapter.targets.names}


def loss_of(model, tokens):
    return model(tokens, labels=tokens).loss


def test_entry_module_imports_neither_torch_nor_transformers():
    code = "import sys, luthier_lora; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_training_with_it_never_imports_peft():
    code = """
import sys, torch, attrs
from luthier import Context
from luthier.testing.worlds import tiny_model
from luthier_lora import Lora
from luthier_lora.adapter import LoraAdapter
given = {f.name: None for f in attrs.fields(Context) if f.default is attrs.NOTHING}
model = LoraAdapter(Lora()).attach(tiny_model(), Context(**{**given, "seed": 0, "dtype": torch.float32}))
model(torch.ones(1, 3, dtype=torch.int64)); print("peft" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_defaults_are_the_documented_ones():
    options = Lora()
    assert (options.r, options.lora_alpha, options.lora_dropout) == (8, 16, None)
    assert options.target_modules is None
    assert not options.use_rslora


@pytest.mark.parametrize("cls", [Lora, Dora, AdaLora])
@pytest.mark.parametrize(("given", "dropout", "expected"),
                         [(None, True, 0.05), (None, False, 0.0), (0.3, False, 0.3), (0.0, True, 0.0)])  # fmt: skip
def test_dropout_is_the_usual_one_unless_the_loss_wants_none_or_the_options_say(
    tmp_path, cls, given, dropout, expected
):
    model = tiny_model()
    adapter = (AdaLoraAdapter if cls is AdaLora else LoraAdapter)(cls(lora_dropout=given))
    model = adapter.attach(model, attrs.evolve(context(model), dropout=dropout))
    assert {m.lora_dropout.p for m in model.modules() if hasattr(m, "lora_dropout")} == {expected}
    adapter.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == expected


@ALL
def test_default_takes_q_and_v_or_what_stands_in_their_place(attached, architecture):
    model, adapter = attached(architecture=architecture)
    assert ends(adapter) == FUSED.get(architecture, {"q_proj", "v_proj"})
    per_layer = len(FUSED.get(architecture, "qv"))
    assert len(adapter.targets.layers) == per_layer * model.config.num_hidden_layers


@ALL
def test_all_linear_takes_every_layer_but_head_router_and_experts(attached, architecture):
    plain = {n for n, m in tiny_model(architecture).named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    _, adapter = attached(Lora(target_modules="all-linear"), architecture)
    assert set(adapter.targets.layers) == plain - {"lm_head"}


@pytest.mark.parametrize("name", ["Qwen2Moe", "DeepseekV3", "Jamba"])
def test_all_linear_leaves_experts_routers_and_their_gates_alone(context, name):
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "num_experts": 4,
    }
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "n_routed_experts": 4}
    sizes |= {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16}
    sizes |= {"first_k_dense_replace": 1, "pad_token_id": 0}
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**sizes)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    adapter = LoraAdapter(Lora(target_modules="all-linear"))
    adapter.attach(model, context())
    names = adapter.targets.layers
    assert len(names) >= 8
    assert not [layer for layer in names if "expert" in layer or "router" in layer or layer.endswith(".gate")]
    assert "lm_head" not in names


def test_all_linear_leaves_a_classifier_alone(context):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_labels=2)
    adapter = LoraAdapter(Lora(target_modules="all-linear"))
    adapter.attach(LlamaForSequenceClassification(config), context())
    assert len(adapter.targets.layers) == 7
    assert "score" not in adapter.targets.layers


@ALL
@BOTH
def test_fresh_adapter_changes_no_output_bit(attached, logits, architecture, options):
    before = logits(tiny_model(architecture))
    model, _ = attached(type(options)(target_modules="all-linear"), architecture, shake=0)
    assert torch.equal(logits(model), before)


@BOTH
def test_fresh_adapter_changes_no_output_bit_in_bfloat16(attached, logits, options):
    before = logits(tiny_model().bfloat16())
    model, adapter = attached(options, shake=0, dtype=torch.bfloat16)
    assert torch.equal(logits(model), before)
    assert all(p.dtype == torch.float32 for group in adapter.groups() for p in group.parameters)


@ALL
def test_disabled_adapter_gives_the_base_bit_for_bit(attached, logits, architecture):
    before = logits(tiny_model(architecture))
    model, adapter = attached(Dora(target_modules="all-linear"), architecture)
    after = logits(model)
    with adapter.disabled():
        assert torch.equal(logits(model), before)
        with adapter.disabled():
            pass
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)
    assert not torch.allclose(after, before)


def test_adapter_is_on_again_after_an_error(attached, logits):
    model, adapter = attached()
    after = logits(model)
    with pytest.raises(ZeroDivisionError), adapter.disabled():
        1 / 0  # noqa: B018
    assert torch.equal(logits(model), after)


@BOTH
def test_only_adapter_parameters_train(attached, tokens, options):
    model, adapter = attached(options)
    names = [name for group in adapter.groups() for name in group.names]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(names) == sorted(trainable)
    assert all("lora_" in name for name in names)
    before = {name: p.clone() for name, p in model.named_parameters()}
    groups = [group.settings(0.1) for group in adapter.groups()]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    loss_of(model, tokens).backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(names)


@BOTH
def test_every_trainable_parameter_gets_a_gradient_after_one_step(attached, tokens, options):
    model, adapter = attached(options)
    loss_of(model, tokens).backward()
    assert all(p.grad.abs().sum() > 0 for group in adapter.groups() for p in group.parameters)


@BOTH
def test_loss_falls(attached, tokens, options):
    model, adapter = attached(options, shake=0)
    optimizer = torch.optim.AdamW([group.settings() for group in adapter.groups()], lr=2e-2)
    losses = []
    for _ in range(15):
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_magnitudes_do_not_decay(attached):
    matrices, magnitudes = attached(Dora())[1].groups()
    assert isinstance(matrices, Group)
    assert (matrices.role, matrices.weight_decay) == ("adapter", None)
    assert (magnitudes.role, magnitudes.weight_decay) == ("adapter", 0.0)
    assert {name.rpartition(".")[2] for name in magnitudes.names} == {"lora_magnitude_vector"}


@BOTH
def test_dropout_acts_in_training_only(attached, tokens, options):
    model, _ = attached(type(options)(lora_dropout=0.5))
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_dropout_keeps_the_expected_update():
    from luthier_lora.layers import Form, Switch
    from luthier_lora.wrappers import LoraLayer

    form = Form(rank=4, scale=2.0, dropout=0.3, dtype=torch.float32, device=torch.device("cpu"))
    layer = LoraLayer(nn.Linear(16, 8), form, Switch(), lambda layer: layer.weight)
    for factor in (layer.lora_A, layer.lora_B):
        nn.init.normal_(factor.weight)
    x = torch.randn(1, 16)
    mean = layer.update(x.expand(20000, -1)).mean(0)
    torch.testing.assert_close(mean, layer.eval().update(x)[0], atol=0.5, rtol=0.05)


def test_rslora_divides_by_the_root_of_the_rank(attached, logits):
    model, adapter = attached(Lora(r=16, lora_alpha=8, use_rslora=True))
    plain, other = attached(Lora(r=16, lora_alpha=32))  # 8 / sqrt(16) = 32 / 16
    other.load_state(adapter.state())
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize(
    ("rank", "alpha", "stabilised", "scale"), [(8, 16, False, 2), (4, 2, False, 0.5), (16, 6, True, 1.5)]
)
def test_update_is_alpha_over_r_times_b_a_x(attached, rank, alpha, stabilised, scale):
    model, _ = attached(Lora(r=rank, lora_alpha=alpha, use_rslora=stabilised, lora_dropout=0.0))
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    expected = scale * (x @ layer.lora_A.weight.T @ layer.lora_B.weight.T)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), expected, rtol=1e-4, atol=1e-5)


def test_seed_decides_the_beginning_and_leaves_torchs_own_alone(context):
    def drawn(seed):
        adapter = LoraAdapter(Lora())
        adapter.attach(tiny_model(), context(seed=seed))
        return torch.cat([t.flatten() for t in adapter.state().values()])

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = drawn(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, drawn(1))
    assert not torch.equal(first, drawn(2))


def test_random_beginning_changes_the_model(attached, logits):
    model, _ = attached(Lora(init_lora_weights=False), shake=0)
    assert not torch.allclose(logits(model), logits(tiny_model()))


def test_float64_base_gets_a_float64_adapter(attached, logits):
    model, adapter = attached(Dora(), dtype=torch.float64)
    assert {p.dtype for group in adapter.groups() for p in group.parameters} == {torch.float64}
    assert logits(model).dtype == torch.float64


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_computes_the_same_within_its_rounding(attached, logits, tokens, options, dtype):
    full, adapter = attached(options, shake=0.05)
    half, other = attached(options, dtype=dtype)
    other.load_state(adapter.state())
    close = {torch.bfloat16: 0.1, torch.float16: 0.015}[dtype]
    assert logits(half).dtype == dtype
    assert (logits(half).float() - logits(full)).norm() < close * logits(full).norm()
    loss_of(half, tokens).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in other.groups()[0].parameters)


def test_it_computes_under_autocast(attached, tokens):
    model, adapter = attached(Dora())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, tokens)
    loss.backward()
    assert all(p.grad.isfinite().all() for group in adapter.groups() for p in group.parameters)


@BOTH
def test_gradients_with_checkpointing_equal_those_without(attached, tokens, options):
    def gradients(checkpointed):
        model, adapter = attached(type(options)(lora_dropout=0.3))
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        torch.manual_seed(0)
        loss_of(model, tokens).backward()
        return torch.cat([p.grad.flatten() for group in adapter.groups() for p in group.parameters])

    assert torch.equal(gradients(True), gradients(False))


def test_other_modules_keep_their_class_and_path(attached):
    plain = {name: type(module) for name, module in tiny_model().named_modules()}
    model, adapter = attached()
    now = {name: type(module) for name, module in model.named_modules()}
    assert {n: now[n] for n in plain if n not in adapter.targets.layers} == {
        n: plain[n] for n in plain if n not in adapter.targets.layers
    }


def test_second_adapter_on_a_model_is_refused(attached, context, refused):
    model, _ = attached()
    assert refused(LoraAdapter(Lora()).attach, model, context()).code == "part-unsupported"


def test_module_in_two_places_is_refused(context, refused):
    model = tiny_model()
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    error = refused(LoraAdapter(Lora()).attach, model, context())
    assert error.code == "part-unsupported"
    assert all(f"model.layers.{number}.self_attn.q_proj" in str(error) for number in range(2))


def test_coverage_counts_what_updates_reach(attached):
    model, adapter = attached()
    found = adapter.coverage()
    weights = {n.replace(".base_layer", ""): p.numel() for n, p in model.named_parameters() if "lora_" not in n}
    reached = sum(size for name, size in weights.items() if name.removesuffix(".weight") in found["matched"])
    assert found["reached_share"] == pytest.approx(reached / sum(weights.values()))
    assert found["reached_share"] + sum(found["unreached"].values()) == pytest.approx(1)
    assert found["unreached"]["embedding"] == pytest.approx(
        weights["model.embed_tokens.weight"] / sum(weights.values())
    )


def test_coverage_names_experts_that_nothing_reaches(attached):
    _, adapter = attached(Lora(target_modules="all-linear"), "mixtral")
    assert adapter.coverage()["unreached"]["experts"] > 0.3
    _, adapter = attached(Lora(lora_dropout=0.0, target_parameters=["gate_up_proj", "down_proj"]), "mixtral")
    assert adapter.coverage()["unreached"]["experts"] < 0.01  # the routers


def test_coverage_counts_a_tied_head_once(attached):
    found = attached(architecture="gemma2")[1].coverage()
    assert "head" not in found["unreached"]


def test_attach_logs_what_it_took(attached, capfd):
    from luthier.logs import set_up

    set_up("info", "json")
    attached(architecture="gpt2")
    set_up("warning")
    assert '"targets": {"c_attn": 2}' in capfd.readouterr().err
