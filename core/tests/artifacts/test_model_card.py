"""Model cards: what the hub reads, what is in them, and that a user's own stays."""

import pytest
from huggingface_hub import ModelCard
from luthier.artifacts.model_card import CARD, card_facts, is_generated, make_card, put_card
from luthier.recipe import Recipe
from luthier.step.opened import open_artifact
from luthier.testing import expect_error


def test_every_artifact_of_a_run_has_a_card_that_the_hub_reads(train, tmp_path):
    run = train(adapter="full", max_steps=2, merge=False)
    text = (run.artifact / CARD).read_text()
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["luthier", "full", "sft"]
    assert card.data.license is None and card.data.base_model is None  # a folder here is not a name of the hub
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    for said in (run.run_id, "2 steps", "| loss |", "adamw", "--learning-rate 0.01", "torch 2", "hash `"):
        assert said in text
    assert str(tmp_path) not in text
    assert is_generated(text)


@pytest.fixture
def note():
    return {
        "luthier": "1.0", "run_id": "r", "base": "abc", "model": {"name_or_path": "org/base"},
        "adapter": {"name": "lora", "r": 4}, "quantizer": {"name": "none"}, "parts": [],
        "card": {"hub_model": "org/base", "data": [{"path": "org/rows", "hub": True}, {"path": "x.jsonl", "hub": False}]},
    }  # fmt: skip


def test_names_of_the_hub_are_linked(note):
    data = ModelCard(make_card(note, library="peft")).data
    assert (data.base_model, data.library_name, data.datasets) == ("org/base", "peft", ["org/rows"])
    assert data.to_dict()["base_model_relation"] == "adapter"


def test_an_older_note_has_a_card_too(note):
    del note["card"]
    assert ModelCard(make_card(note, library="peft")).data.library_name == "peft"


@pytest.mark.parametrize(
    ("file", "library", "talk"),
    [("model.onnx", "onnx", "luthier chat RUN"), ("model.gguf", "gguf", "luthier chat RUN"),
     ("model.safetensors", "transformers", "luthier chat FOLDER"),
     ("adapter_config.json", "peft", "luthier chat FOLDER")],
)  # fmt: skip
def test_a_card_names_the_library_that_reads_the_files_and_what_can_be_talked_with(note, tmp_path, file, library, talk):
    (tmp_path / file).touch()
    (tmp_path / "config.json").touch()
    note["card"]["settings"] = {"seed": 0}
    put_card(tmp_path, tmp_path / "none", note)
    text = (tmp_path / CARD).read_text()
    assert ModelCard(text).data.library_name == library
    assert talk in text and is_generated(text)


@pytest.mark.parametrize("file", ["model.onnx", "model.gguf"])
def test_an_export_is_not_opened_and_its_run_is_named(tmp_path, file):
    folder = tmp_path / "run" / "exported"
    folder.mkdir(parents=True)
    (folder / file).touch()
    with expect_error("artifact-not-found", str(folder)) as caught:
        open_artifact(folder)
    assert str(folder.parent) not in caught.value.remedy
    (folder.parent / "run.json").write_text("{}")
    with expect_error("artifact-not-found", str(folder)) as caught:
        open_artifact(folder)
    assert str(folder.parent) in caught.value.remedy


def test_absolute_paths_are_shown_by_their_last_name():
    recipe = Recipe.from_dict({"model": "/home/me/models/base", "data": "/home/me/secret/rows.jsonl"}).to_dict()
    facts = card_facts(recipe, {})
    assert facts["data"] == [{"path": "rows.jsonl", "hub": False}] and facts["hub_model"] is None
    text = make_card({"model": recipe["model"], "adapter": {"name": "lora"}, "card": facts}, library="peft")
    assert "/home/me" not in text and "base" in text


def test_a_card_that_a_user_has_written_stays_and_others_are_written_again(train):
    run = train(adapter="full", max_steps=1)
    saved = run.save(run.output_path / "copy")
    first = (saved / CARD).read_text()
    (saved / CARD).write_text(first.replace("2", "3", 1) + "\nMine.\n")
    run.save(saved)
    assert (saved / CARD).read_text().endswith("Mine.\n")
    (saved / CARD).write_text(first)
    run.save(saved)
    assert (saved / CARD).read_text() == first
    (saved / CARD).write_text("mine alone")
    run.save(saved)
    assert (saved / CARD).read_text() == "mine alone"
