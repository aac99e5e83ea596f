"""Rows of tokens alone are PEFT's TRAINABLE_TOKENS: real PEFT reads our folder, and we read its."""

import json
import warnings

import pytest
import torch
import transformers
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from luthier_selective import Modules, files, options_of
from luthier_selective.adapter import SelectiveAdapter
from safetensors.torch import load_file, save_file

IDS = [9, 30, 8]  # within TOKENS, and in no order
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNTIED, TIED = ("llama", "qwen2"), ("gpt2", "gemma2")  # gemma2 scales its embeddings


@pytest.fixture(scope="module")
def peft():
    warnings.filterwarnings("ignore", module="peft")
    import peft

    return peft


@pytest.fixture
def saved_by_peft(peft, tmp_path):
    """PEFT's model with moved rows, and the folder that it wrote."""

    def save(architecture, targets=None, **changes):
        torch.manual_seed(0)
        config = peft.TrainableTokensConfig(token_indices=IDS, target_modules=targets, **changes)
        model = peft.get_peft_model(tiny_model(architecture), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / "peft")
        return model, tmp_path / "peft"

    return save


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("architecture", UNTIED + TIED)
def test_our_folder_gives_the_same_outputs_in_plain_peft(attached, logits, peft, tmp_path, architecture):
    model, adapter = attached(Modules(token_ids=IDS), architecture)
    adapter.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    close(logits(model), logits(theirs))
    assert not torch.allclose(logits(model), logits(tiny_model(architecture)), atol=1e-3)


@pytest.mark.parametrize("architecture", UNTIED + TIED)
def test_pefts_folder_gives_the_same_outputs_in_ours(attached, logits, saved_by_peft, architecture):
    theirs, folder = saved_by_peft(architecture)
    model, adapter = attached(options_of(folder), architecture, shake=0.3)  # a head of its own is then the base's
    adapter.load(folder)
    close(logits(model), logits(theirs))
    close(logits(adapter.merge(context(tiny_model(architecture)))), logits(theirs))


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], ["lm_head"], r".*\.embed_tok\w+"])
def test_pefts_rows_of_chosen_modules_are_read_too(attached, logits, saved_by_peft, targets):
    theirs, folder = saved_by_peft("llama", targets)
    model, adapter = attached(options_of(folder), shake=0.3)
    adapter.load(folder)
    close(logits(model), logits(theirs))


def test_our_folder_is_pefts_file_for_file(attached, saved_by_peft, tmp_path):
    _, folder = saved_by_peft("gpt2")
    _, adapter = attached(options_of(folder), "gpt2")
    adapter.load(folder)
    adapter.save(tmp_path / "ours")
    ours, theirs = load_file(tmp_path / "ours" / WEIGHTS), load_file(folder / WEIGHTS)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (
        json.loads((tmp_path / "ours" / CONFIG).read_text()).keys() <= json.loads((folder / CONFIG).read_text()).keys()
    )


def test_rows_in_the_layout_of_selective_are_still_read(attached, logits, tmp_path):
    model, adapter = attached(Modules(token_ids=IDS))
    config = {"method": "modules", "token_ids": IDS, "base_model_name_or_path": None}
    files.save_tensors(tmp_path, config, adapter.state())
    fresh, other = attached(Modules(token_ids=IDS), shake=0.3)
    other.load(tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_rows_besides_other_parameters_and_of_a_head_with_a_bias_are_not_in_pefts_layout(attached, tmp_path):
    _, adapter = attached(Modules(token_ids=IDS, norms=True))
    adapter.save(tmp_path / "norms")
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes, num_attention_heads=2))
    biased = SelectiveAdapter(Modules(token_ids=IDS))
    biased.attach(model, context(model))
    biased.save(tmp_path / "bias")  # PEFT would leave the bias out
    for folder in ("norms", "bias"):
        assert {file.name for file in (tmp_path / folder).iterdir()} == {files.CONFIG, files.WEIGHTS}


def edit_config(**changes):
    def edit(folder):
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (edit_config(token_indices=[8, 9, 30]), ("[8, 9, 30]", "Set token_ids")),
        (edit_config(token_indices="all"), ("'all'",)),
        (edit_config(peft_type="LORA"), ("'LORA'",)),
        (edit_config(layer_replication=[[0, 1]]), ("layer_replication", "peft.trainable_tokens")),
        (edit_config(target_modules=["wte", "other"]), ("lacks", "other")),
        (edit_tensors(lambda t: t.update({"base_model.model.x": torch.zeros(2)})), ("unknown", "x")),
        (edit_tensors(lambda t: t.pop("base_model.model.transformer.wte.trainable_tokens_delta")), ("lacks", "wte")),
        (edit_tensors(lambda t: t["base_model.model.lm_head.trainable_tokens_delta"].add_(1)), ("tied head",)),
        (edit_tensors(lambda t: [t.update({k: v[:2].clone()}) for k, v in dict(t).items()]), ("[2, 32]", "[3, 32]")),
        (lambda folder: (folder / WEIGHTS).write_text("no"), (WEIGHTS,)),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), (WEIGHTS, "pickle")),
        (lambda folder: (folder / CONFIG).write_text("{"), (CONFIG, "JSON")),
    ],
)
def test_a_folder_of_rows_that_does_not_fit_is_refused_by_name_and_nothing_changes(
    attached, refused, tmp_path, damage, said
):
    _, adapter = attached(Modules(token_ids=IDS), "gpt2")
    adapter.save(tmp_path)
    damage(tmp_path)
    before = {name: tensor.clone() for name, tensor in adapter.state().items()}
    error = refused(adapter.load, tmp_path)
    assert error.code in ("artifact-mismatch", "artifact-not-found", "file-damaged")
    assert all(fact in str(error) for fact in said), str(error)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state().items())


@pytest.mark.parametrize("options", [Modules(), Modules(token_ids=IDS, norms=True)])
def test_pefts_rows_are_refused_where_something_else_trains(attached, refused, tmp_path, options):
    attached(Modules(token_ids=IDS))[1].save(tmp_path)
    error = refused(attached(options)[1].load, tmp_path)
    assert error.code == "artifact-mismatch" and f"token_ids: {IDS}" in str(error)


def test_merging_twice_is_refused(attached, refused):
    _, adapter = attached(Modules(token_ids=IDS))
    adapter.merge(context(tiny_model()))
    assert refused(adapter.merge, context(tiny_model())).code == "artifact-unmergeable"
