"""What only looks like an operation: each is known by what it computes, and left alone where that is something else."""

import torch
from luthier.model import attention
from luthier.model.operations.install_operations import install, installed_operations, ordinary_operations
from luthier.model.operations.recognise_layers import find_attention, find_block
from luthier.model.operations.recognise_operations import find_mlp, find_norm
from operation_models import (
    Scaled,
    attention_module,
    counts,
    packed_model,
    step,
    wrapped_forward,
)
from torch import nn
from torch.nn import functional


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
