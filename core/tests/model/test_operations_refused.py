"""Why a module keeps its own forward: found, told apart and logged."""

import functools
import inspect
import json

import pytest
import torch
from luthier.logs import run_log
from luthier.model.operations.findings import Findings
from luthier.model.operations.install_operations import install, installed_operations, ordinary_operations
from luthier.model.operations.recognise_layers import find_attention, find_block
from luthier.model.operations.recognise_operations import find_mlp, find_norm
from operation_models import Scaled, assert_same, attention_module, counts, packed_model, step, wrapped_forward
from torch import nn
from transformers import DynamicCache


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
