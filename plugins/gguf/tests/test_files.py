"""GGUF files of every architecture and type: what other readers make of them, and what is refused before it is written."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model, tiny_tokenizer
from luthier_gguf import Gguf
from luthier_gguf.architectures import rope_factors
from luthier_gguf.comparison import _read_model
from luthier_gguf.exporter import FILE, GgufExporter
from luthier_gguf.weights import BOUNDS, TYPES, decode, encode, largest_error
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def written(folder, model, options=None, tokenizer=None):
    exporter = GgufExporter(options or Gguf())
    exporter.check(model.config)
    exporter.export(model, tokenizer or tiny_tokenizer(), folder)
    return exporter.verify(model, tokenizer or tiny_tokenizer(), folder)


def make_ternary(model, scale=0.11):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name and "lm_head" not in name:
                weight.copy_(torch.sign(weight) * (weight.abs() > 0.1) * scale)
    return model


SLOW = pytest.mark.slow
ARCHITECTURES = ["llama", "qwen2", pytest.param("mistral", marks=SLOW), pytest.param("qwen3", marks=SLOW)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["f16", pytest.param("q8_0", marks=SLOW), pytest.param("q4_0", marks=SLOW)])
def test_both_readers_give_the_model_back(tmp_path, architecture, kind):
    changes = {"sliding_window": None} if architecture == "mistral" else {}
    model = tiny_model(architecture, intermediate_size=64, **changes).eval()
    found = written(tmp_path, model, Gguf(type=kind))
    assert found["weights, of their block's largest"] <= BOUNDS[TYPES[kind]]
    assert found["logits, relative"] < {"f16": 0.005, "q8_0": 0.05, "q4_0": 0.6}[kind]
    held = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / FILE).tensors}
    assert held["blk.1.ffn_down.weight"] == TYPES[kind] and held["output_norm.weight"] == Kind.F32


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_ternary_weights_are_held_exactly_in_two_bits(tmp_path, kind):
    model = make_ternary(tiny_model(hidden_size=256, intermediate_size=256)).eval()
    found = written(tmp_path, model, Gguf(type=kind))
    assert found["logits, relative"] < 0.005
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / FILE).tensors}
    held = tensors["blk.0.attn_v.weight"]
    assert held.n_bytes * 8 / held.n_elements == {"tq1_0": 1.6875, "tq2_0": 2.0625}[kind]
    expected = model.model.layers[0].self_attn.v_proj.weight.detach().numpy()
    np.testing.assert_allclose(decode(held.data, held.tensor_type), expected, rtol=5e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(sorted(BOUNDS)), scale=st.sampled_from([1e-3, 1.0, 1e4]))
def test_no_type_moves_a_weight_beyond_its_bound(seed, kind, scale):
    values = np.random.default_rng(seed).standard_t(2, (3, 512)).clip(-6, 6).astype(np.float32) * scale
    if kind in (Kind.TQ1_0, Kind.TQ2_0):
        values = np.sign(values).astype(np.float32) * (np.abs(values) > 0.5 * scale) * scale
    read = decode(encode(values, kind), kind)
    assert largest_error(read, values, kind) <= BOUNDS[kind]
    assert largest_error(read + np.float32(0.3) * np.abs(values).max(), values, kind) > BOUNDS[kind]


def test_tied_embeddings_are_written_once(tmp_path):
    written(tmp_path, tiny_model(tie_word_embeddings=True).eval())
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(tmp_path / FILE).tensors}


def test_a_model_in_bfloat16_is_compared_in_bfloat16(tmp_path):
    assert written(tmp_path, tiny_model().eval().bfloat16())["logits, relative"] < 0.02


def test_llama3s_scaled_positions_are_written_as_factors(tmp_path):
    model = tiny_model(rope_parameters=LLAMA3).eval()
    written(tmp_path, model)
    held = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / FILE).tensors}["rope_freqs.weight"]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    plain = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(held, (plain / scaled).numpy(), rtol=1e-5)
    assert len(set(rope_factors(model.config))) > 1


def test_linearly_scaled_positions_are_written(tmp_path):
    model = tiny_model(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}).eval()
    written(tmp_path, model)
    fields = gguf.GGUFReader(tmp_path / FILE).fields
    assert fields["llama.rope.scaling.type"].contents() == "linear"
    assert fields["llama.rope.scaling.factor"].contents() == 4.0


REFUSED = [
    ("gpt2", {}, {}, ("model_type", "'gpt2'")),
    ("gemma2", {}, {}, ("model_type", "'gemma2'")),
    ("mistral", {}, {}, ("sliding_window",)),
    ("llama", {"attention_bias": True}, {}, ("attention_bias",)),
    ("llama", {"hidden_act": "gelu"}, {}, ("hidden_act",)),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {},
        ("rope_parameters",),
    ),
    ("llama", {}, {"type": "q8_0"}, ("intermediate_size", "48", "32")),
    ("llama", {}, {"type": "tq2_0"}, ("hidden_size", "32", "256")),
]


@pytest.mark.parametrize(("architecture", "changes", "options", "message"), REFUSED)
def test_what_the_target_would_compute_otherwise_is_refused_by_its_config(architecture, changes, options, message):
    config = tiny_model(architecture, **changes).config
    with pytest.raises(LuthierError) as caught:
        GgufExporter(Gguf(**options)).check(config)
    assert all(fact in str(caught.value) for fact in message)
    assert caught.value.code == "part-unsupported"


def test_weights_that_are_not_ternary_are_refused_or_fall_back(tmp_path):
    model = tiny_model(hidden_size=256, intermediate_size=256).eval()
    with expect_error("part-unsupported", "model.layers.0.self_attn.q_proj.weight") as caught:
        written(tmp_path, model, Gguf(type="tq1_0"))
    assert caught.value.code == "part-unsupported" and not list(tmp_path.iterdir())
    make_ternary(model)
    torch.nn.init.normal_(model.model.layers[1].mlp.up_proj.weight)
    for fallback, kind in (("f16", Kind.F16), ("q8_0", Kind.Q8_0)):
        (tmp_path / fallback).mkdir()
        written(tmp_path / fallback, model, Gguf(type="tq1_0", fallback=fallback, max_logit_error=0.2))
        held = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / fallback / FILE).tensors}
        assert held["blk.1.ffn_up.weight"] == kind and held["blk.0.ffn_up.weight"] == Kind.TQ1_0


@pytest.mark.parametrize(("value", "code"), [(float("nan"), "gguf:nonfinite-weight"), (1e5, "part-unsupported")])
def test_a_weight_that_no_file_can_hold_leaves_none(tmp_path, value, code):
    model = tiny_model().eval()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(LuthierError) as caught:
        written(tmp_path, model)
    assert caught.value.code == code and "down_proj" in caught.value.where
    assert not list(tmp_path.iterdir())


def spoil_weight(path):
    data = bytearray(path.read_bytes())
    data[-8:-6] = np.float16(1.0).tobytes()  # of a weight; what ends the file is padding or the last matrix
    path.write_bytes(data)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])


def cut_to_nothing(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("damage", [spoil_weight, cut_short, cut_to_nothing])
def test_a_damaged_file_is_found(tmp_path, damage):
    model = tiny_model().eval()
    written(tmp_path, model)
    damage(tmp_path / FILE)
    with pytest.raises(LuthierError) as caught:
        GgufExporter(Gguf()).verify(model, tiny_tokenizer(), tmp_path)
    assert caught.value.code == "artifact-mismatch"


def test_logits_beyond_the_bound_are_an_error(tmp_path):
    with expect_error("artifact-mismatch", "model.gguf", "1e-06"):
        written(tmp_path, tiny_model().eval(), Gguf(max_logit_error=1e-6))


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
TERNARY_SIZES = {"hidden_size": 256, "intermediate_size": 256}  # blocks of ternary types are 256 weights
FOR_LLAMA_CPP = [
    *((architecture, kind, {}) for architecture in ("llama", "qwen2", "qwen3") for kind in ("f16", "q8_0", "q4_0")),
    *(("mistral", kind, {"sliding_window": None}) for kind in ("f16", "q8_0", "q4_0")),
    ("llama", "f16", {"rope_parameters": LLAMA3}),
    ("llama", "f16", {"rope_parameters": LINEAR}),
    ("llama", "f16", {"tie_word_embeddings": True}),
    ("qwen3", "f16", {"head_dim": 32}),
    *((architecture, kind, TERNARY_SIZES) for architecture in ("llama", "qwen2") for kind in ("tq1_0", "tq2_0")),
]


@SLOW
@pytest.mark.parametrize(("architecture", "kind", "changes"), FOR_LLAMA_CPP)
def test_llama_cpp_computes_the_logits_of_transformers(tmp_path, architecture, kind, changes):
    """Both read the same file. For quantized weights llama.cpp rounds activations to int8, transformers does not."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip compiles it")
    model = tiny_model(architecture, **{"intermediate_size": 64, **changes}).eval()
    if kind.startswith("tq"):
        make_ternary(model)
    written(tmp_path, model, Gguf(type=kind))
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 24)
    with torch.no_grad():
        ours = _read_model(tmp_path / FILE, model)(torch.from_numpy(ids)[None]).logits[0]
    reader = llama_cpp.Llama(
        str(tmp_path / FILE), n_ctx=64, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False
    )
    reader.eval(ids.tolist())
    theirs = torch.from_numpy(np.array(reader.scores[: len(ids)]))
    reader.close()
    spread = (ours - ours.mean(-1, keepdim=True)).square().mean().sqrt()
    assert (theirs - ours).square().mean().sqrt() / spread < (0.003 if kind == "f16" else 0.06)
