"""Operations in models: recognised by what a module computes, the same numbers with them, and nothing left behind."""

import copy
import functools
import inspect
import json

import pytest
import torch
from luthier.logs import run_log
from luthier.model import attention
from luthier.model.operations.findings import Findings
from luthier.model.operations.install_operations import install, installed_operations, ordinary_operations
from luthier.model.operations.recognise_layers import find_attention, find_block
from luthier.model.operations.recognise_operations import find_mlp, find_norm
from luthier.model.policy import ModelPolicy
from luthier.testing.worlds import ARCHITECTURES, random_batch, tiny_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

LENGTHS = (20, 9, 1, 33, 2)
LLAMA = {"norm": 5, "mlp": 2, "attention": 2, "layer": 2}
EXPECTED = {
    **{name: LLAMA for name in ("llama", "qwen2", "mistral", "granite")},
    "qwen3": {**LLAMA, "norm": 9},
    "gemma2": {"norm": 9, "mlp": 2, "attention": 2},
    "phi3": {"norm": 5, "mlp": 2},
    "mixtral": {"norm": 5, "attention": 2, "layer": 2},
    "gpt2": {},
    "gpt_neox": {},
}


def packed_model(architecture="llama", dtype=torch.float32):
    model = tiny_model(architecture).to(dtype)
    if architecture == "mixtral":
        model.set_experts_implementation("eager")  # grouped products know no float64
    attention.install_attention(model)
    return model


def step(model, lengths=LENGTHS):
    """Log-probabilities, and the gradients of their sum by name."""
    model.zero_grad(set_to_none=True)
    found = ModelPolicy(model).token_logprobs(random_batch(lengths))
    found.sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def counts(installed):
    return {kind: sum(classes.values()) for kind, classes in installed.replaced.items()}


def assert_same(mine, theirs, bound):
    torch.testing.assert_close(mine[0], theirs[0], rtol=bound, atol=bound)
    assert mine[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(mine[1][name], gradient, rtol=bound, atol=bound * 10, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_loss_and_gradients_are_those_of_the_models_own_forward(architecture, dtype, bound):
    model = packed_model(architecture, dtype)
    theirs = step(model)
    with installed_operations(model, ordinary_operations()) as installed:
        assert counts(installed) == EXPECTED[architecture]
        assert_same(step(model), theirs, bound)


def test_under_autocast_they_agree_as_far_as_it_rounds():
    model = packed_model()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(model)
        with installed_operations(model, ordinary_operations()):
            mine = step(model)
    torch.testing.assert_close(mine[0], theirs[0], rtol=0.05, atol=0.05)


def test_what_products_are_given_under_autocast_is_cast_once_for_all_of_them():
    model, seen = packed_model(), []
    first = model.model.layers[0]
    layers = [first.self_attn.q_proj, first.self_attn.k_proj, first.self_attn.v_proj]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16), installed_operations(model, ordinary_operations()):
        step(model)
    assert {x.dtype for x in seen} == {torch.bfloat16}
    assert len({x.data_ptr() for x in seen}) == 1


def test_afterwards_the_model_is_as_it_was():
    model = packed_model()
    before, names = model.state_dict(), set(model.state_dict())
    with installed_operations(model, ordinary_operations()):
        assert set(model.state_dict()) == names
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_forward_that_somebody_put_around_ours_is_not_taken_away():
    model = packed_model()
    installed, layer = install(model, ordinary_operations()), model.model.layers[0]
    inner = layer.forward
    layer.forward = outer = functools.partial(inner)
    installed.remove()
    assert layer.forward is outer


def test_a_module_with_a_forward_of_its_own_is_left_alone():
    model = packed_model()
    norm = model.model.norm
    norm.forward = lambda x: x
    installed = install(model, ordinary_operations())
    assert counts(installed)["norm"] == 4
    installed.remove()
    assert norm.forward(3) == 3


def test_a_copy_of_the_model_computes_with_its_own_weights():
    model = packed_model()
    with installed_operations(model, ordinary_operations()):
        theirs = step(model)[0]
        twin = copy.deepcopy(model)
        with torch.no_grad():
            model.model.layers[0].mlp.gate_proj.weight.zero_()
            model.model.norm.weight.zero_()
        torch.testing.assert_close(step(twin)[0], theirs, rtol=0, atol=0)


def test_generation_with_a_cache_is_the_models_own():
    model = packed_model().eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    with attention.generating_attention(model):
        theirs = model.generate(ids, **told)
        with installed_operations(model, ordinary_operations()):
            assert torch.equal(model.generate(ids, **told), theirs)


def test_hidden_states_and_hooks_of_others_see_what_they_saw():
    model = packed_model()
    norm, seen = model.model.layers[0].post_attention_layernorm, []
    norm.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    policy, batch = ModelPolicy(model), random_batch(LENGTHS)
    theirs = [x.detach() for x in policy.hidden(batch, [0, 1, 2])]
    with installed_operations(model, ordinary_operations()):
        mine = policy.hidden(batch, [0, 1, 2])
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close([x.detach() for x in mine], theirs, rtol=1e-5, atol=1e-5)


def test_transformers_own_checkpointing_goes_on():
    model = packed_model()
    theirs = step(model)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    runs = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with installed_operations(model, ordinary_operations()):
        assert_same(step(model), theirs, 1e-5)
    assert len(runs) == 2  # in forward, and again in backward


@pytest.mark.parametrize("mode", [True, "selective"])
def test_recomputation_gives_the_same_gradients(mode):
    from luthier.model import recompute

    model = packed_model()
    with installed_operations(model, ordinary_operations()):
        theirs = step(model)
        with recompute.install_recompute(model, mode):
            assert_same(step(model), theirs, 0.0)


def test_adapters_of_peft_stay_where_they_are():
    from peft import LoraConfig, inject_adapter_in_model

    model = packed_model()
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), model)
    theirs = step(model)
    with installed_operations(model, ordinary_operations()) as installed:
        assert counts(installed) == LLAMA
        assert_same(step(model), theirs, 1e-5)
    assert any("lora_A" in name for name in theirs[1])


def test_without_weights_structure_alone_decides():
    config = tiny_model().config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert counts(install(model, ordinary_operations(), verified=False)) == LLAMA


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_module_computes_is_known_before_it_has_weights(architecture):
    model = packed_model(architecture)
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(model.config)
    attention.install_attention(hollow)
    for (name, mine), theirs in zip(model.named_modules(), hollow.modules(), strict=True):
        for find in (find_norm, find_mlp, find_attention, find_block):
            assert find(theirs) == find(mine), (name, find.__name__)


def test_a_token_costs_what_its_rows_are_wide():
    installed = install(packed_model("qwen3"), ordinary_operations())
    heads = 4 * 8 + 2 * 8
    assert installed.widths == {"norm": 5 * 32 + 4 * 8 + 2 * heads, "rope": 2 * heads, "silu": 2 * 48}


# what looks alike and is not


class Scaled(nn.Module):
    """An RMS norm in all but one thing."""

    def __init__(self, power=-0.5, offset=0.0):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6
        self.power, self.offset = power, offset

    def forward(self, x):
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        row = wide * (wide.pow(2).mean(-1, keepdim=True) + self.eps).pow(self.power)
        return (self.weight + self.offset) * row.to(x.dtype)


def test_a_norm_is_known_by_what_it_computes():
    assert find_norm(Scaled()).form.offset == 0.0
    assert find_norm(Scaled(offset=1.0)).form.offset == 1.0
    assert find_norm(nn.RMSNorm(8, eps=1e-6)).form.rounded is False
    assert find_norm(Scaled(power=-0.51)) is None
    assert find_norm(Scaled(offset=0.5)) is None
    assert find_norm(nn.LayerNorm(8, bias=False)) is None
    assert find_norm(nn.Linear(8, 8)) is None


class Mlp(nn.Module):
    def __init__(self, act=nn.SiLU(), hidden=lambda act, gate, up: act(gate) * up, dropout=0.0):
        super().__init__()
        self.up_proj, self.gate_proj = nn.Linear(8, 12), nn.Linear(8, 12)  # in an order that misleads
        self.down_proj, self.act_fn, self.hidden, self.dropout = nn.Linear(12, 8), act, hidden, dropout

    def forward(self, x):
        mixed = self.hidden(self.act_fn, self.gate_proj(x), self.up_proj(x))
        return functional.dropout(self.down_proj(mixed), self.dropout, self.training)


def test_an_mlp_is_known_by_what_it_computes():
    assert (find_mlp(Mlp()).gate, find_mlp(Mlp()).kind) == ("gate_proj", "silu")
    assert find_mlp(Mlp(nn.GELU(approximate="tanh"))).kind == "gelu"
    assert find_mlp(Mlp(nn.GELU())) is None  # by the error function: another number, seen in any dtype
    assert find_mlp(Mlp(nn.ReLU())) is None
    assert find_mlp(Mlp(hidden=lambda act, gate, up: act(gate) + up)) is None
    assert find_mlp(Mlp(hidden=lambda act, gate, up: act(gate) * up.clamp(max=1))) is None
    assert find_mlp(Mlp(dropout=0.5).eval()) is None  # although nothing is dropped now


def test_an_mlp_is_known_although_its_last_layer_is_zero():
    mlp = Mlp()
    nn.init.zeros_(mlp.down_proj.weight)
    assert find_mlp(mlp) is not None


def attention_module(model=None):
    return (model or packed_model()).model.layers[0].self_attn


def wrapped_forward(module, change):
    """The same class, with a forward that `change` alters."""
    own = type(module)
    module.__class__ = type("Changed", (own,), {"forward": lambda self, *a, **k: change(own.forward, self, *a, **k)})
    return module


def test_attention_that_depends_on_far_positions_is_left_alone():
    def scaled(forward, self, hidden_states, **told):
        return forward(self, hidden_states * (1 + (told["position_ids"] > 8192).float()[..., None]), **told)

    assert find_attention(wrapped_forward(attention_module(), scaled)) is None


def test_attention_that_drops_its_documents_is_left_alone():
    def deaf(forward, self, hidden_states, **told):
        return forward(self, hidden_states, **{k: v for k, v in told.items() if not k.startswith("cu_seq")})

    assert find_attention(wrapped_forward(attention_module(), deaf)) is None


def test_what_its_own_forward_tells_attention_is_told_by_ours():
    assert find_attention(attention_module(packed_model("mistral"))).settings["sliding_window"] == 8
    found = find_attention(attention_module(packed_model("gemma2"))).settings
    assert (found["softcap"], found["sliding_window"]) == (2.0, 8)
    assert find_attention(attention_module(packed_model("granite"))).settings["scaling"] == 0.3


def test_attention_is_not_dropped_outside_training():
    model = packed_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    found = find_attention(attention_module(model))
    assert found.dropout == 0.5
    with installed_operations(model.eval(), ordinary_operations()):
        torch.testing.assert_close(step(model)[0], step(model)[0], rtol=0, atol=0)


def test_a_layer_is_known_by_how_it_adds():
    assert find_block(packed_model().model.layers[0]).multiplier == 1.0
    assert find_block(packed_model("granite").model.layers[0]).multiplier == 0.5
    assert find_block(packed_model("gemma2").model.layers[0]) is None

    def doubled(forward, self, hidden_states, **told):
        return 2 * forward(self, hidden_states, **told)

    assert find_block(wrapped_forward(packed_model().model.layers[0], doubled)) is None


def test_what_only_looks_alike_is_named_in_the_report():
    model = packed_model()
    wrapped_forward(model.model.layers[0].mlp, lambda forward, self, x: forward(self, x) * 2)
    installed = install(model, ordinary_operations())
    assert {kind: {name: found.reason for name, found in left.items()} for kind, left in installed.left.items()} == {
        "mlp": {"Changed": "other numbers"}
    }
    assert counts(installed)["mlp"] == 1


def test_trying_a_forward_leaves_modules_and_random_numbers_alone():
    model = packed_model().eval()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    install(model, ordinary_operations()).remove()
    assert torch.equal(torch.rand(2), expected)
    assert not any(module.training for module in model.modules())
    assert model.config._attn_implementation == attention.NAME


# in a run


def test_a_run_computes_by_operations_and_gives_the_model_back(train, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    run = train(model=model, tokenizer=_tokenizer(model_folder), max_steps=1)
    lines = (run.output_path / "log.jsonl").read_text()
    assert '"operation"' in lines or run.steps == 1
    assert not any("forward" in vars(module) for module in model.modules())


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# why a module keeps its own forward


def finding(module, find):
    findings = Findings()
    assert find(module, True, findings) is None
    return findings.closest()


def test_a_cache_by_another_name_changes_nothing():
    def renamed(forward, self, hidden_states, position_embeddings, store=None, **told):
        return forward(self, hidden_states, position_embeddings=position_embeddings, **told)

    layer = packed_model().model.layers[0]
    wrapped_forward(layer.self_attn, renamed)
    wrapped_forward(layer, lambda forward, self, *args, memory=None, **told: forward(self, *args, **told))
    assert find_attention(layer.self_attn) is not None
    assert find_block(layer) is not None


def cache_name(forward):
    (name,) = {"cache", "past_key_values"} & inspect.signature(forward).parameters.keys()
    return name


def test_a_layer_that_is_given_a_cache_by_any_name_computes_by_itself():
    model, calls = packed_model(), []
    layer = model.model.layers[0]
    own = type(layer).forward
    wrapped_forward(layer, lambda forward, self, *args, **told: calls.append(told) or forward(self, *args, **told))
    starts = torch.tensor([0, 4], dtype=torch.int32)
    told = {"position_embeddings": model.model.rotary_emb(torch.zeros(1, 4, 32), torch.arange(4)[None])}
    told |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 4, "max_length_k": 4}
    with installed_operations(model, ordinary_operations()) as installed:
        assert installed.replaced["layer"] == {"Changed": 1, "LlamaDecoderLayer": 1}
        calls.clear()
        layer(torch.randn(1, 4, 32), **told)
        assert calls == []
        cache, name = DynamicCache(config=model.config), cache_name(own)
        layer(torch.randn(1, 4, 32), **told, **{name: cache})
        assert calls[0][name] is cache


def test_a_forward_that_raises_is_said_to_raise():
    def broken(forward, self, x):
        raise ValueError("two rows at most")

    found = finding(wrapped_forward(packed_model().model.layers[0].mlp, broken), find_mlp)
    assert (found.reason, found.detail) == ("raised", "ValueError: two rows at most")
    assert finding(Scaled(power="half"), find_norm).reason == "raised"


def test_a_forward_that_needs_what_nobody_knows_is_said_to():
    for module, find in ((attention_module(), find_attention), (packed_model().model.layers[0], find_block)):
        own = type(module)
        module.__class__ = type("Asking", (own,), {"forward": functools.partialmethod(asking_forward, own.forward)})
        assert str(finding(module, find)) == "unknown argument: tempo"


def asking_forward(self, forward, hidden_states, *, tempo, **told):
    return forward(self, hidden_states, **told)


def test_a_layer_that_tells_its_attention_something_unknown_is_said_to():
    def telling(forward, self, hidden_states, **told):
        return forward(self, hidden_states, tempo=3, **told)

    assert (
        str(finding(wrapped_forward(packed_model().model.layers[0], telling), find_block)) == "unknown argument: tempo"
    )


def test_a_layer_that_gives_other_numbers_is_said_to():
    def doubled(forward, self, hidden_states, **told):
        return 2 * forward(self, hidden_states, **told)

    assert finding(wrapped_forward(packed_model().model.layers[0], doubled), find_block).reason == "other numbers"
    assert finding(nn.LayerNorm(8, bias=False), find_norm).reason == "other numbers"


def test_what_a_forward_of_python_itself_cannot_mean_is_not_hidden():
    def stopped(forward, self, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_mlp(wrapped_forward(packed_model().model.layers[0].mlp, stopped))


class Wrapped(nn.Module):
    """A plugin's layer, which says neither how wide it is nor what it wraps."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_a_plugins_layer_without_sizes_is_no_obstacle():
    model = packed_model()
    layer = model.model.layers[0]
    layer.self_attn.q_proj, layer.mlp.up_proj = Wrapped(layer.self_attn.q_proj), Wrapped(layer.mlp.up_proj)
    theirs = step(model)
    with installed_operations(model, ordinary_operations()) as installed:
        assert counts(installed) == {"norm": 5, "mlp": 1, "attention": 1, "layer": 2}
        assert_same(step(model), theirs, 1e-5)


def test_why_a_module_keeps_its_forward_is_logged(tmp_path):
    model = packed_model()
    wrapped_forward(model.model.layers[0].mlp, lambda forward, self, x: forward(self, x) * 2)
    with run_log("run", tmp_path / "log.jsonl"):
        install(model, ordinary_operations()).remove()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["event"] == "own forward kept"]
    assert [(line["kind"], line["module"], line["reason"]) for line in kept] == [("mlp", "Changed", "other numbers")]
