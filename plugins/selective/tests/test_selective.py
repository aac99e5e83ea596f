"""What trains is what is named, and nothing else; merged, it is a plain model."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.testing.contexts import context
from luthier.testing.worlds import ARCHITECTURES, tiny_model
from luthier_selective import BitFit, Modules
from luthier_selective.adapter import SelectiveAdapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

WEIGHTS = "selective.safetensors"
BIASED = ("gpt2", "qwen2", "gpt_neox")
FORMS = {
    "bitfit": BitFit(),
    "layers": Modules(target_modules=["mlp", "self_attn.v_proj"]),
    "norms": Modules(),
    "embeddings": Modules(embeddings=True),
    "rows": Modules(token_ids=[8, 30, 63]),
    "rows and norms": Modules(token_ids=[8], norms=True),
}
FORM = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS.keys())


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_entry_module_imports_no_torch():
    code = "import sys, luthier_selective; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("architecture", BIASED)
def test_bitfit_trains_every_bias_and_nothing_else(attached, architecture):
    model, adapter = attached(BitFit(), architecture)
    biases = {name for name, _ in tiny_model(architecture).named_parameters() if name.endswith("bias")}
    assert trained(model) == biases == set(adapter.state())
    assert {group.role for group in adapter.groups()} == {"bias"}
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == biases


def test_bitfit_can_be_limited_to_some_modules(attached):
    model, _ = attached(BitFit(target_modules=["0.self_attn.q_proj"]), "qwen2")
    assert trained(model) == {"model.layers.0.self_attn.q_proj.bias"}


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) & {"llama", "gemma2", "mistral"}))
def test_bitfit_refuses_a_model_without_biases(refused, architecture):
    model = tiny_model(architecture)
    error = refused(SelectiveAdapter(BitFit()).attach, model, context(model))
    assert (error.code, error.where) == ("model-target", "adapter")
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (Modules(target_modules=["0.mlp"]), {f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}),
        (Modules(target_modules=r".*1\..*[qk]_proj"), {f"model.layers.1.self_attn.{n}_proj.weight" for n in "qk"}),
        (Modules(embeddings=True), {"model.embed_tokens.weight", "lm_head.weight"}),
        (Modules(embeddings=True, norms=False), {"model.embed_tokens.weight", "lm_head.weight"}),
        (Modules(token_ids=[5]), {"model.embed_tokens.rows", "lm_head.rows"}),
    ],
)
def test_modules_trains_what_is_named(attached, options, names):
    assert trained(attached(options)[0]) == names


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen2"])
def test_modules_without_options_trains_the_norms(attached, architecture):
    model, adapter = attached(Modules(), architecture)
    assert trained(model) == {n for n, _ in model.named_parameters() if "norm" in n or "ln_" in n}
    assert {group.role for group in adapter.groups()} <= {"norm", "bias"}


@pytest.mark.parametrize(
    "architecture", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gemma2"))]
)
@FORM
def test_merged_it_is_a_plain_model_of_the_same_outputs(attached, logits, tmp_path, options, architecture):
    if options == BitFit() and architecture not in BIASED:
        architecture = "qwen2"
    if options == FORMS["layers"] and architecture == "gpt2":
        options = Modules(target_modules=["mlp", "attn.c_attn"])
    model, adapter = attached(options, architecture)
    before = logits(model)
    merged = adapter.merge(context(tiny_model(architecture)))
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before, atol=1e-5, rtol=0)
    assert not torch.allclose(before, logits(tiny_model(architecture)), atol=1e-3)
    assert not trained(merged)


@FORM
def test_files_and_state_come_back_to_the_bit(attached, logits, tmp_path, options):
    model, adapter = attached(options, "qwen2")
    adapter.save(tmp_path)
    fresh, other = attached(options, "qwen2", shake=0.3)
    other.load(tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    again, third = attached(options, "qwen2", shake=0.3)
    third.load_state(adapter.state())
    assert torch.equal(logits(again), logits(model))


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 63), min_size=1, max_size=5, unique=True), st.sampled_from(["llama", "gpt2", "gemma2"]))
def test_rows_compute_and_learn_as_rows_of_the_whole_weight_would(ids, architecture):
    tokens = torch.arange(64)[None]  # 0 is the padding, whose row an embedding never trains
    model, whole = (tiny_model(architecture).double() for _ in range(2))
    SelectiveAdapter(Modules(token_ids=ids)).attach(model, context(model))
    outputs = [one(tokens, labels=tokens) for one in (model, whole)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-10, rtol=1e-10)
    for output in outputs:
        output.loss.backward()
    pairs = [(model.get_input_embeddings(), whole.get_input_embeddings()), (model.lm_head, whole.lm_head)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.rows.grad, theirs.weight.grad[ids], atol=1e-10, rtol=1e-10)
        assert ours.base_layer.weight.grad is None


def test_no_other_row_moves_and_a_tied_head_shares_the_rows(attached):
    before = tiny_model("gpt2").lm_head.weight.clone()
    model, adapter = attached(Modules(token_ids=[5, 9]), "gpt2")
    assert len(adapter.state()) == 1
    assert model.lm_head.rows is model.get_input_embeddings().rows
    merged = adapter.merge(context(tiny_model()))
    changed = (merged.lm_head.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [5, 9]
    assert merged.lm_head.weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("options", "code", "where", "words"),
    [
        (Modules(target_modules=["down_prj"]), "model-target", "target_modules", ("down_proj",)),
        (Modules(target_modules="("), "recipe-wrong-type", "target_modules", ("target_modules",)),
        (Modules(target_modules="q_proj"), "model-target", "target_modules", ("target_modules",)),
        (Modules(norms=False), "train-nothing", "adapter", ("adapter",)),
        (Modules(token_ids=[320]), "recipe-out-of-range", "token_ids", ("below 320",)),
        (Modules(token_ids=[3, 3]), "recipe-out-of-range", "token_ids", ("different",)),
        (Modules(token_ids=[3], embeddings=True), "recipe-conflict", "token_ids", ("already",)),
        (Modules(target_modules=[]), "train-nothing", "target_modules", ("[]",)),
        (Modules(token_ids=[]), "train-nothing", "token_ids", ("[]",)),
        (BitFit(target_modules=""), "train-nothing", "target_modules", ("''",)),
        (BitFit(target_modules=["q_proj"]), "model-target", "target_modules", ("target_modules",)),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(refused, options, code, where, words):
    model = tiny_model()
    error = refused(SelectiveAdapter(options).attach, model, context(model))
    assert (error.code, error.where) == (code, where)
    assert all(fact in str(error) for fact in words)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_quantized_weight_is_refused(refused):
    model = tiny_model()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    error = refused(SelectiveAdapter(Modules(target_modules=["q_proj"])).attach, model, context(model))
    assert "quantized" in str(error)


def test_there_is_no_base_to_switch_to(attached, refused):
    _, adapter = attached(Modules())
    assert refused(adapter.disabled().__enter__).code == "part-unsupported"


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "artifact-not-found"),
        (lambda f: (f / "selective.json").unlink(), "artifact-not-found"),
        (lambda f: (f / WEIGHTS).write_text("no"), "file-damaged"),
        (lambda f: (f / "selective.json").write_text("{"), "file-damaged"),
        (lambda f: (f / "selective.json").write_text('{"method": "bitfit"}'), "artifact-mismatch"),
        (lambda f: save_file({"other": torch.ones(2)}, f / WEIGHTS), "artifact-mismatch"),
        (lambda f: save_file({k: v[:-1].clone() for k, v in load_file(f / WEIGHTS).items()}, f / WEIGHTS),
         "artifact-mismatch"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused_and_nothing_changes(attached, refused, tmp_path, damage, code):
    _, adapter = attached(Modules())
    adapter.save(tmp_path)
    damage(tmp_path)
    before = {name: tensor.clone() for name, tensor in adapter.state().items()}
    assert refused(adapter.load, tmp_path).code == code
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state().items())


def test_nan_is_not_merged(attached, refused):
    _, adapter = attached(Modules())
    adapter.state()["model.norm.weight"][0] = float("nan")
    assert refused(adapter.merge, context(tiny_model())).where == "model.norm.weight"
