"""What trains besides plain updates, and how: patterns, biases, whole modules, PiSSA, LoRA+, presets; PEFT as reference."""

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.testing.worlds import tiny_model
from luthier_lora import Dora, Lora, options_of
from luthier_lora.adapter import LoraAdapter
from luthier_lora.merging import wrappers
from luthier_lora.options import PRESETS
from luthier_lora.patterns import choose_by_pattern
from luthier_lora.wrappers import principal_factors
from safetensors.torch import load_file, save_file

FORMS = {
    "patterns": Lora(
        lora_dropout=0.0,
        target_modules="all-linear",
        rank_pattern={"1.self_attn.q_proj": 2, "q_proj|down_proj": 5, "c_fc": 3},
        alpha_pattern={r"layers\.0\..*_proj": 7, "c_attn": 5},
    ),
    "dora patterns": Dora(lora_dropout=0.0, r=3, rank_pattern={"q_proj|c_attn": 2}, use_rslora=True),
    "own biases": Lora(lora_dropout=0.0, bias="lora_only"),
    "all biases": Lora(lora_dropout=0.0, bias="all"),
    "dora biases": Dora(lora_dropout=0.0, bias="all"),
    "whole modules": Lora(lora_dropout=0.0, modules_to_save=["embed_tokens", "lm_head", "wte", "norm", "ln_f"]),
    "token rows": Lora(lora_dropout=0.0, trainable_token_indices=[9, 3, 12]),
    "dora, token rows and a whole norm": Dora(
        lora_dropout=0.0, trainable_token_indices=[5, 9], modules_to_save=["norm"]
    ),
    "pissa": Lora(lora_dropout=0.0, r=4, init_lora_weights="pissa", target_modules="all-linear"),
}
QUICK = {(name, "gpt2" if "biases" in name else "qwen2") for name in FORMS}
CASES = [
    pytest.param(name, architecture, marks=[] if (name, architecture) in QUICK else pytest.mark.slow)
    for architecture in ("llama", "gpt2", "qwen2", "gemma2")
    for name in FORMS
    if not ("bias" in name and architecture in ("llama", "gemma2"))  # which have none
]
CASE = pytest.mark.parametrize(("name", "architecture"), CASES)


def options_for(name, architecture):
    """A form without what it names for other architectures."""
    options, modules = FORMS[name], dict(tiny_model(architecture).named_modules())
    ends = {path.rpartition(".")[2] for path in modules}
    saved = [end for end in options.modules_to_save or [] if end in ends] or None
    patterns = {
        field: {
            pattern: value
            for pattern, value in getattr(options, field).items()
            if any(choose_by_pattern({pattern: 1}, path, 0) for path in modules)
        }
        for field in ("rank_pattern", "alpha_pattern")
    }
    return attrs.evolve(options, modules_to_save=saved, **patterns)


@pytest.fixture(scope="module")
def peft():
    import warnings

    warnings.filterwarnings("ignore", module="peft")
    import peft

    return peft


def close(ours, theirs, within=5e-6):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=within * max(1.0, theirs.abs().max().item()))


def trainable(model):
    """PEFT's trainable parameters under the names of its files."""
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {name.replace(".modules_to_save.default", "").replace(".default", ""): p for name, p in names.items()}
    return {name.replace("magnitude_vector.weight", "magnitude_vector"): p for name, p in names.items()}


@CASE
def test_our_folder_gives_pefts_outputs_and_gradients(attached, peft, logits, tokens, tmp_path, name, architecture):
    options = options_for(name, architecture)
    model, adapter = attached(options, architecture, shake=0.05)
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path, is_trainable=True).train()
    close(logits(model), logits(theirs))
    assert not torch.allclose(logits(model), logits(tiny_model(architecture)), atol=1e-3)
    for one in (model, theirs):
        one(tokens, labels=tokens).loss.backward()
    expected = trainable(theirs)
    assert adapter.state().keys() == expected.keys()
    for group in adapter.groups():
        for path, parameter in zip(group.names, group.parameters, strict=True):
            close(parameter.grad, expected[f"base_model.model.{path}"].grad)


@CASE
def test_pefts_folder_gives_its_outputs_in_ours(attached, peft, logits, tmp_path, name, architecture):
    options = options_for(name, architecture)
    fields = ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "rank_pattern", "alpha_pattern")
    shared = {field: getattr(options, field) for field in (*fields, "modules_to_save")}
    begin = "pissa" if options.init_lora_weights == "pissa" else False
    targets = sorted({layer.rpartition(".")[2] for layer in attached(options, architecture)[1].targets.layers})
    config = peft.LoraConfig(
        **shared, target_modules=targets, use_dora=isinstance(options, Dora), init_lora_weights=begin
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(tiny_model(architecture), config)
    with torch.no_grad():
        for parameter in trainable(theirs).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path)
    model, adapter = attached(options_of(tmp_path), architecture, shake=0)
    adapter.load(tmp_path)
    close(logits(model), logits(theirs))


@CASE
def test_it_merges_is_switched_off_and_begins_as_nothing(attached, context, logits, name, architecture):
    options = options_for(name, architecture)
    before = logits(tiny_model(architecture))
    assert torch.equal(logits(attached(options, architecture, shake=0)[0]), before)
    model, adapter = attached(options, architecture, shake=0.05)
    with adapter.disabled():
        assert torch.equal(logits(model), before)
    outputs = logits(model)
    merged = adapter.merge(context())
    close(logits(merged), outputs, 1e-5)
    assert not wrappers(merged)
    plain = {path: type(module) for path, module in tiny_model(architecture).named_modules()}
    assert {path: type(module) for path, module in merged.named_modules()} == plain
    assert not any(parameter.requires_grad for parameter in merged.parameters())


@CASE
def test_state_and_files_come_back_to_the_bit(attached, logits, tmp_path, name, architecture):
    model, adapter = attached(options_for(name, architecture), architecture)
    adapter.save(tmp_path)
    state = {path: tensor.clone() for path, tensor in adapter.state().items()}
    for options in (options_for(name, architecture), options_of(tmp_path)):
        fresh, other = attached(options, architecture, shake=0)
        other.load(tmp_path)
        assert torch.equal(logits(fresh), logits(model))
        again, third = attached(options, architecture, shake=0)
        third.load_state(state)
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("options", "code", "found"),
    [
        (Lora(trainable_token_indices=[3, 3]), "recipe-out-of-range", [3, 3]),
        (Lora(trainable_token_indices=[10**6]), "recipe-out-of-range", [10**6]),
        (Lora(trainable_token_indices=[3], modules_to_save=["wte"]), "recipe-conflict", "transformer.wte"),
        (Lora(trainable_token_indices=[3], target_modules=["lm_head", "c_attn"]), "recipe-conflict", "lm_head"),
    ],
)
def test_rows_that_are_not_there_or_train_already_are_refused(attached, refused, options, code, found):
    error = refused(lambda: attached(options, "gpt2"))
    assert (error.code, error.where, error.found) == (code, "trainable_token_indices", found)


def test_only_the_rows_of_the_tokens_move_and_the_merged_weight_has_them(attached, context, tokens):
    model, adapter = attached(Lora(trainable_token_indices=[9, 3]), "gpt2")
    before = model.get_input_embeddings().base_layer.weight.clone()
    optimizer = torch.optim.AdamW([p for g in adapter.groups() for p in g.parameters], lr=0.1, weight_decay=0.5)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    (rows,) = (tensor for name, tensor in adapter.state().items() if name.endswith("trainable_tokens_delta"))
    merged = adapter.merge(context())
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    after = merged.lm_head.weight
    assert torch.equal(after[[9, 3]], rows) and not torch.equal(rows, before[[9, 3]])
    moved = (after != before).any(1).nonzero().flatten().tolist()
    assert moved == [3, 9]


def test_files_of_other_tokens_are_refused(attached, refused, tmp_path):
    attached(Lora(trainable_token_indices=[9, 3]))[1].save(tmp_path)
    assert options_of(tmp_path).trainable_token_indices == [9, 3]
    for other in ([3, 9], None):
        error = refused(attached(Lora(trainable_token_indices=other))[1].load, tmp_path)
        assert error.code == "artifact-mismatch"


def test_only_what_is_named_trains(attached):
    options = Lora(bias="lora_only", modules_to_save=["lm_head"])
    model, adapter = attached(options, "qwen2")
    ends = {path.partition("layers.")[2] or path for path in adapter.state()}
    assert {end.rpartition("proj.")[2] for end in ends if "proj" in end} == {
        "lora_A.weight",
        "lora_B.weight",
        "base_layer.bias",
    }
    assert "base_model.model.lm_head.weight" in adapter.state()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for group in adapter.groups() for p in group.parameters}
    assert {group.role for group in adapter.groups()} == {"adapter", "bias", "head"}
    assert adapter.coverage()["matched"][-1] == "lm_head"
    assert "head" not in adapter.coverage()["unreached"]


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_a_tied_embedding_that_trains_leaves_the_head_as_it_was(attached, context, architecture):
    end = {"gpt2": "wte", "gemma2": "embed_tokens"}[architecture]
    model, adapter = attached(Lora(modules_to_save=[end]), architecture)
    head = model.lm_head.weight.clone()
    merged = adapter.merge(context())
    assert not merged.config.tie_word_embeddings
    assert torch.equal(merged.lm_head.weight, head)
    assert not torch.equal(merged.get_input_embeddings().weight, head)


def test_loraplus_lets_b_learn_faster(attached):
    _, adapter = attached(Dora(loraplus_lr_ratio=16.0))
    rates = {name.rpartition("proj.")[2]: group.lr_scale for group in adapter.groups() for name in group.names}
    assert rates == {"lora_A.weight": 1.0, "lora_B.weight": 16.0, "lora_magnitude_vector": 1.0}
    assert len(attached(Lora())[1].groups()) == 1


@pytest.mark.parametrize("kind", [Lora, Dora])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_its_table_and_what_is_given_wins(kind, preset):
    table = {"quality": (256, 512, "all-linear"), "fast": (16, 32, None)}[preset]
    options = kind(preset=preset)
    assert (options.r, options.lora_alpha, options.target_modules) == table
    assert kind(preset=preset, r=8).r == 8
    assert kind(preset=preset, lora_alpha=16).lora_alpha == 16
    assert kind(preset=preset, target_modules=["k_proj"]).target_modules == ["k_proj"]
    assert (kind().r, kind().lora_alpha, kind().target_modules) == (8, 16, None)


def test_a_preset_whose_rank_no_layer_can_have_is_refused_with_what_can_be_given(attached):
    with pytest.raises(LuthierError) as refused:
        attached(Lora(preset="quality"))
    assert (refused.value.code, refused.value.where) == ("recipe-out-of-range", "r")
    assert "32" in refused.value.remedy and "preset" in refused.value.remedy
    with pytest.raises(LuthierError) as refused:
        attached(Lora(r=256))
    assert "preset" not in refused.value.remedy


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.floats(0.2, 4), st.integers(0, 99))
def test_principal_factors_are_the_best_approximation_of_their_rank(rows, columns, rank, scale, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    factors = principal_factors(weight, rank, scale)
    rest = weight - scale * factors["B"] @ factors["A"]
    values = torch.linalg.svdvals(weight)
    assert torch.linalg.svdvals(rest)[0] <= (values[rank] if rank < len(values) else 0.0) + 1e-5  # Eckart and Young
    torch.testing.assert_close(factors["A"].norm(dim=1), factors["B"].norm(dim=0), atol=1e-4, rtol=1e-4)


def test_pissa_trains_principal_factors_and_leaves_the_base(attached):
    model, adapter = attached(Lora(r=4, lora_alpha=8, init_lora_weights="pissa", lora_dropout=0.5), shake=0)
    base = dict(tiny_model().named_parameters())
    for path, layer in wrappers(model).items():
        weight = base[f"{path}.weight"]
        assert torch.equal(layer.base_layer.weight, weight)
        energy = (2.0 * layer.lora_B.weight @ layer.lora_A.weight).square().sum()
        torch.testing.assert_close(energy, torch.linalg.svdvals(weight)[:4].square().sum())
    assert not any("first" in name for name in adapter.state())


@pytest.mark.parametrize(
    ("options", "architecture", "where", "words"),
    [
        (Lora(bias="all"), "llama", "bias", ("bias",)),
        (Lora(bias="lora_only", target_modules=["o_proj"]), "qwen2", "bias", ("bias",)),
        (Lora(modules_to_save=["embd"]), "llama", "modules_to_save", ("embed_tokens",)),
        (Lora(modules_to_save=["mlp"]), "llama", "modules_to_save", ("gate_proj",)),
        (Lora(modules_to_save=["q_proj"]), "llama", "modules_to_save", ("modules_to_save",)),
        (Lora(rank_pattern={"k_proj": 2}), "llama", "rank_pattern", ("rank_pattern",)),
        (Lora(alpha_pattern={"(": 2}), "llama", "alpha_pattern", ("alpha_pattern",)),
        (Lora(r=33), "llama", "r", ("r",)),
        (Lora(rank_pattern={"0.*q_proj": 99}), "llama", "rank_pattern.0.*q_proj", ("rank_pattern.0.*q_proj",)),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(context, refused, options, architecture, where, words):
    model = tiny_model(architecture)
    error = refused(LoraAdapter(options).attach, model, context())
    assert error.where == where
    assert all(fact in str(error) for fact in words)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_below_one_is_refused(refused, field):
    error = refused(lambda: Lora(**{field: {"q_proj": 0}}))
    assert (error.code, error.where) == ("recipe-out-of-range", f"Lora.{field}.q_proj")


def test_pissa_of_a_parameter_is_refused(refused):
    options = Lora(lora_dropout=0.0, init_lora_weights="pissa", target_parameters=["experts.down_proj"])
    assert refused(LoraAdapter, options).where == "init_lora_weights"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Lora(alpha_pattern={"q_proj": 3}), ("lora_alpha 16",)),
        (Lora(bias="all"), ("bias 'none'",)),
        (Lora(init_lora_weights="pissa"), ("adapter_config.json", "init_lora_weights")),
        (Lora(modules_to_save=["lm_head"]), ("lacks 1 tensors",)),
    ],
)
def test_an_adapter_of_other_options_is_not_loaded(attached, refused, tmp_path, other, words):
    attached(Lora(), "qwen2")[1].save(tmp_path)
    error = refused(attached(other, "qwen2")[1].load, tmp_path)
    assert error.code == "artifact-mismatch"
    assert all(fact in str(error) for fact in words)


def test_nan_in_a_whole_module_is_not_merged(attached, context, refused, tmp_path):
    _, adapter = attached(Lora(modules_to_save=["lm_head"]))
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapter.load(tmp_path)
    error = refused(adapter.merge, context())
    assert (error.code, error.where) == ("artifact-unmergeable", "lm_head.weight")
