"""Prompts: where they begin, what the encoder leaves behind, and what is refused."""

import json
import subprocess
import sys

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.testing.contexts import context
from luthier.testing.worlds import random_batch, tiny_model, tiny_tokenizer
from luthier_prompt import PrefixTuning, PromptTuning, PTuningV2
from luthier_prompt.adapters import PromptAdapter
from luthier_prompt.tables import EncodedTable, PromptTable
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OPTIONS = [PromptTuning(num_virtual_tokens=3), PrefixTuning(num_virtual_tokens=3), PTuningV2(num_virtual_tokens=3)]
ALL = pytest.mark.parametrize("options", OPTIONS, ids=["prompt", "prefix", "encoded"])
DAMAGES = {
    "no config": (lambda f: (f / CONFIG).unlink(), "artifact-not-found", CONFIG),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "artifact-not-found", WEIGHTS),
    "pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "artifact-not-found", "pickle"),
    "no json": (lambda f: (f / CONFIG).write_text("{"), "file-damaged", "not JSON"),
    "lora": (lambda f: (f / CONFIG).write_text('{"peft_type": "LORA"}'), "artifact-mismatch", "'LORA'"),
    "no tensors": (lambda f: (f / WEIGHTS).write_text("no"), "file-damaged", "not a whole safetensors"),
    "other": (lambda f: save_file({"other": torch.ones(2)}, f / WEIGHTS), "artifact-mismatch", "it holds other"),
    "shape": (
        lambda f: save_file({"prompt_embeddings": torch.ones(2, 2)}, f / WEIGHTS),
        "artifact-mismatch",
        "has shape [2, 2]",
    ),
}


def test_the_entry_module_imports_no_torch():
    code = "import sys, luthier_prompt; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_prompt_begins_with_embeddings_of_the_vocabulary(attached):
    model, adapter = attached(PromptTuning(num_virtual_tokens=6))
    known = model.get_input_embeddings().weight
    rows = adapter.table.weight
    assert all((known == row).all(1).any() for row in rows)
    assert len({tuple(row.tolist()) for row in rows}) > 1
    drawn = attached(PromptTuning(num_virtual_tokens=200, init="random"))[1].table.weight
    assert drawn.std().item() == pytest.approx(known.std().item(), rel=0.1)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_prompt_of_a_text_computes_what_the_text_before_the_document_does(attached, scores, architecture):
    ids = torch.tensor(tiny_tokenizer()("12 is", add_special_tokens=False)["input_ids"])
    model, adapter = attached(PromptTuning(num_virtual_tokens=len(ids), init="text", init_text="12 is"), architecture)
    document = random_batch((7,), supervised=1.0)
    whole = torch.cat([ids, document.input_ids])
    with torch.no_grad():
        expected = tiny_model(architecture).eval()(input_ids=whole[None]).logits[0].log_softmax(-1)
        rows = torch.arange(len(ids), len(whole) - 1)
        found = scores(model, adapter, document)[1:]
        torch.testing.assert_close(found, expected[rows, whole[rows + 1]], rtol=1e-4, atol=1e-4)
    opened = PromptAdapter(PromptTuning(num_virtual_tokens=len(ids), init="text", init_text="12 is"))
    around = attrs.evolve(context(model), purpose="open", encode=None)
    assert opened.attach(tiny_model(architecture), around) is opened.model  # its files bring the table


@pytest.mark.parametrize(
    ("options", "where"),
    [({"init": "text"}, "PromptTuning.init"), ({"init_text": "x"}, "PromptTuning.init"),
     ({"init": "text", "init_text": " "}, "PromptTuning.init_text")],
)  # fmt: skip
def test_a_text_to_begin_with_is_there_where_it_is_asked_for(refused, options, where):
    assert refused(lambda: PromptTuning(**options)).where == where


@pytest.mark.parametrize("kind", [PrefixTuning, PTuningV2])
def test_a_prefix_begins_with_the_deviation_asked_for_or_at_zero(attached, kind):
    one, two = (attached(kind(num_virtual_tokens=60, init_std=std))[1].table.whole() for std in (0.2, 0.4))
    torch.testing.assert_close(two, 2 * one)
    assert 0.1 < one.std() / 0.2 < 1.1
    assert not attached(kind(init_weights="zero"))[1].table.whole().any()


def test_the_projection_can_be_left_out(attached):
    assert isinstance(attached(PTuningV2())[1].table, EncodedTable)
    assert isinstance(attached(PTuningV2(prefix_projection=False))[1].table, PromptTable)
    assert attached(PTuningV2(encoder_hidden_size=7))[1].table.inner.out_features == 7


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_the_columns_of_a_table_are_those_of_the_whole(rows, own, hidden, width, layers):
    torch.manual_seed(rows)
    for table in (EncodedTable(rows, own, hidden, layers * width), PromptTable(torch.randn(rows, layers * width))):
        parts = [table.columns(layer * width, (layer + 1) * width) for layer in range(layers)]
        torch.testing.assert_close(torch.cat(parts, 1), table.whole())


def test_the_saved_table_computes_what_the_encoder_computed(attached, scores, tmp_path):
    model, adapter = attached(PTuningV2(num_virtual_tokens=3, init_std=0.7))
    batch = random_batch((7, 12, 4), supervised=1.0)
    before = scores(model, adapter, batch)
    adapter.save(tmp_path)
    adapter.load(tmp_path)
    assert isinstance(adapter.table, PromptTable)
    torch.testing.assert_close(scores(model, adapter, batch), before, rtol=1e-5, atol=1e-5)
    (group,) = adapter.groups()
    assert [id(p) for p in group.parameters] == [id(p) for p in model.parameters() if p.requires_grad]


def test_the_state_of_a_folded_prompt_goes_into_a_fresh_encoder(attached, scores, tmp_path):
    options = PTuningV2(num_virtual_tokens=3)
    model, adapter = attached(options)
    adapter.save(tmp_path)
    adapter.load(tmp_path)
    fresh, other = attached(options)
    other.load_state(adapter.state())
    batch = random_batch((7, 12), supervised=1.0)
    assert torch.equal(scores(fresh, other, batch), scores(model, adapter, batch))


@ALL
def test_a_document_that_goes_on_gets_no_prompt_of_its_own(attached, scores, options):
    model, adapter = attached(options, dtype=torch.float64)
    whole = random_batch((9,), supervised=1.0)
    places = {"document_starts": torch.tensor([0, 4, 9]), "continues": torch.tensor([-1, 0])}
    cut = attrs.evolve(whole, **places, unit_of=torch.tensor([0, 0]))
    torch.testing.assert_close(scores(model, adapter, cut), scores(model, adapter, whole))


@ALL
def test_a_second_prompt_is_refused(attached, refused, options):
    model, adapter = attached(options)
    assert refused(adapter.attach, model, context(model)).code == "part-unsupported"


@ALL
def test_a_prompt_that_leaves_documents_no_position_is_refused(attached, refused, options):
    most = tiny_model().config.max_position_embeddings
    error = refused(attached, attrs.evolve(options, num_virtual_tokens=most))
    assert (error.code, error.where) == ("recipe-out-of-range", "num_virtual_tokens")


@ALL
def test_state_of_another_size_is_a_corrupt_checkpoint(attached, refused, options):
    _, adapter = attached(options)
    _, other = attached(attrs.evolve(options, num_virtual_tokens=4))
    error = refused(adapter.load_state, other.state())
    assert error.code == "checkpoint-corrupt"
    assert "[4," in str(error)


@ALL
@pytest.mark.parametrize(("damage", "code", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_folder_that_does_not_fit_is_refused_and_nothing_changes(
    attached, refused, tmp_path, options, damage, code, words
):
    _, adapter = attached(options)
    adapter.save(tmp_path)
    damage(tmp_path)
    before = {name: tensor.clone() for name, tensor in adapter.state().items()}
    error = refused(adapter.load, tmp_path)
    assert error.code == code
    assert words in str(error)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state().items())


def test_a_prefix_is_not_loaded_as_a_prompt(attached, refused, tmp_path):
    attached(PrefixTuning())[1].save(tmp_path)
    assert "PREFIX_TUNING" in str(refused(attached(PromptTuning())[1].load, tmp_path))


def test_the_table_is_saved_in_float32(attached, tmp_path):
    attached(PromptTuning(), dtype=torch.float64)[1].save(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["prompt_embeddings"].dtype == torch.float32
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "PROMPT_TUNING"


def test_a_model_without_values_gets_a_prompt_of_the_same_shape():
    whole = tiny_model()
    with torch.device("meta"):
        model = type(whole)(whole.config)
    adapter = PromptAdapter(PromptTuning(num_virtual_tokens=3))
    adapter.attach(model, attrs.evolve(context(whole), device=torch.device("meta"), has_values=False))
    assert adapter.table.weight.is_meta
    assert adapter.table.weight.shape == (3, 32)
