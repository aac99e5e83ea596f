"""Files and state: what is written comes back, and what does not fit is refused without changing anything."""

import json

import pytest
import torch
from luthier_lora import Dora, Lora, options_of
from luthier_lora.adapter import LoraAdapter
from safetensors.torch import load_file, save_file

BOTH = pytest.mark.parametrize("options", [Lora(r=4), Dora(r=4, use_rslora=True)], ids=["lora", "dora"])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def saved(attached, tmp_path):
    """A folder that holds an adapter of rank 8 on a tiny Llama."""
    attached(Lora())[1].save(tmp_path)
    return tmp_path


def edit(path, **changes):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@BOTH
def test_saved_adapter_comes_back_on_a_fresh_base(attached, logits, tmp_path, options):
    model, adapter = attached(options)
    adapter.save(tmp_path / "new" / "folder")
    fresh, other = attached(options_of(tmp_path / "new" / "folder"), shake=0)
    other.load(tmp_path / "new" / "folder")
    assert torch.equal(logits(fresh), logits(model))


@BOTH
def test_state_comes_back_to_the_bit_into_the_same_parameters(attached, options):
    _, adapter = attached(options)
    state = {name: tensor.clone() for name, tensor in adapter.state().items()}
    _, other = attached(options, shake=0)
    parameters = [p for group in other.groups() for p in group.parameters]
    other.load_state(state)
    assert all(torch.equal(other.state()[name], tensor) for name, tensor in state.items())
    assert all(a is b for a, b in zip(parameters, [p for g in other.groups() for p in g.parameters], strict=True))


def test_files_hold_float32_under_pefts_names(attached, tmp_path):
    _, adapter = attached(Dora(), dtype=torch.float64)
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {name for name in tensors if name.startswith(layer)} == {
        f"{layer}.lora_A.weight",
        f"{layer}.lora_B.weight",
        f"{layer}.lora_magnitude_vector",
    }


def test_same_adapter_writes_the_same_bytes(attached, tmp_path):
    for name in ("a", "b"):
        attached(Lora())[1].save(tmp_path / name)
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in (CONFIG, WEIGHTS))


def test_config_names_the_base_model(attached, tmp_path):
    model, adapter = attached(Lora())
    adapter.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] is None
    model.config._name_or_path = "org/model"
    adapter.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "org/model"


def test_options_read_from_a_folder_are_those_that_made_it(attached, tmp_path):
    made = Lora(r=4, lora_alpha=3, lora_dropout=0.0, use_rslora=True, target_parameters=["experts.down_proj"])
    attached(made, "mixtral")[1].save(tmp_path)
    found = options_of(tmp_path)
    assert (found.r, found.lora_alpha, found.lora_dropout, found.use_rslora) == (4, 3, 0.0, True)
    assert sorted(found.target_modules) == ["q_proj", "v_proj"]
    assert len(found.target_parameters) == 2


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file_is_named(saved, attached, refused, name):
    (saved / name).unlink()
    error = refused(attached(Lora())[1].load, saved)
    assert error.code == "artifact-not-found"
    assert name in str(error) and error.where == str(saved)


def test_pickle_is_not_read(saved, attached, refused):
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    error = refused(attached(Lora())[1].load, saved)
    assert error.code == "artifact-not-found"
    assert "pickle" in str(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"), ("lacks 1 tensors",)),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), ("adapter_model.safetensors", "1")),
        (lambda t: t.update({k: v[..., :-1].clone() for k, v in t.items() if "q_proj.lora_A" in k}), ("[8, 31]",)),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_changes(saved, attached, refused, change, words):
    edit_tensors(saved / WEIGHTS, change)
    _, adapter = attached(Lora(), shake=0.3)
    before = {name: tensor.clone() for name, tensor in adapter.state().items()}
    error = refused(adapter.load, saved)
    assert error.code == "artifact-mismatch"
    assert all(fact in str(error) for fact in words)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state().items())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (Lora(r=4), "r 8"),
        (Lora(lora_alpha=8), "lora_alpha"),
        (Lora(use_rslora=True), "use_rslora"),
        (Dora(), "use_dora"),
    ],
)
def test_other_options_than_it_was_trained_with_are_refused(saved, attached, refused, options, field):
    error = refused(attached(options)[1].load, saved)
    assert error.code == "artifact-mismatch"
    assert field in str(error)


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "LOHA"},
        {"trainable_token_indices": {"lm_head": [1]}},
        {"lora_bias": True},
        {"init_lora_weights": "olora"},
        {"a_feature_of_next_year": {"on": True}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_we_do_not_have_is_refused_by_its_name(saved, attached, refused, changes):
    edit(saved / CONFIG, **changes)
    for call in (attached(Lora())[1].load, options_of):
        error = refused(call, saved)
        assert error.code == "artifact-mismatch"
        assert next(iter(changes)) in str(error)


def test_fields_left_out_have_pefts_defaults(saved):
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "use_dora": True}
    (saved / CONFIG).write_text(json.dumps(config))
    assert options_of(saved) == Dora(r=8, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj"])


def test_layers_to_transform_is_no_option_of_ours(saved, refused):
    edit(saved / CONFIG, layers_to_transform=[0])
    assert "layers_to_transform" in str(refused(options_of, saved))


@pytest.mark.parametrize(
    ("name", "text"), [(CONFIG, "{"), (CONFIG, "[]"), (CONFIG, "\x00"), (WEIGHTS, ""), (WEIGHTS, "no")]
)
def test_damaged_files_are_refused_with_their_place(saved, attached, refused, name, text):
    (saved / name).write_text(text)
    error = refused(attached(Lora())[1].load, saved)
    assert error.code == "file-damaged"
    assert error.where == str(saved / name)


def test_cut_weights_are_refused(saved, attached, refused):
    whole = (saved / WEIGHTS).read_bytes()
    for length in (7, 100, len(whole) - 1):
        (saved / WEIGHTS).write_bytes(whole[:length])
        assert refused(attached(Lora())[1].load, saved).code == "file-damaged"


def test_adapter_of_another_model_is_refused(saved, attached, refused):
    assert refused(attached(Lora(), "gpt2")[1].load, saved).code == "artifact-mismatch"
    assert refused(attached(Lora(), hidden_size=64)[1].load, saved).code == "artifact-mismatch"


def test_state_of_another_adapter_is_a_corrupt_checkpoint(attached, refused):
    _, adapter = attached(Lora())
    assert refused(attached(Dora())[1].load_state, adapter.state()).code == "checkpoint-corrupt"


def test_folder_may_be_a_string(saved, attached):
    attached(Lora())[1].load(str(saved))
    assert isinstance(LoraAdapter(options_of(str(saved))), LoraAdapter)
