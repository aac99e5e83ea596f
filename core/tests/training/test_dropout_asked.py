"""`model.dropout` holds in a run's own steps alone: the artifact and a handed model have the rates that they came with."""

import json

import luthier
import pytest
from luthier.model.dropout import find_rates
from luthier.testing import expect_error
from luthier.testing.worlds import save_tiny_model, tiny_model, tiny_tokenizer
from transformers import MambaConfig, MambaForCausalLM

DROPS = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("gpt2") / "model", "gpt2", **DROPS))


def test_the_saved_model_says_what_its_base_said(train, gpt2):
    run = train(model={"name_or_path": gpt2, "dropout": 0.0}, adapter="full", max_steps=1)
    config = json.loads((run.artifact / "config.json").read_text())
    assert {name: config[name] for name in DROPS} == DROPS


def test_a_handed_model_comes_back_with_its_rates(train, gpt2):
    model = tiny_model("gpt2", **DROPS)
    before = [(rate.name, rate.value) for rate in find_rates(model)]
    train(model=model, tokenizer=tiny_tokenizer(), max_steps=1, **{"model.dropout": 0.5})
    assert [(rate.name, rate.value) for rate in find_rates(model) if "lora" not in rate.name][: len(before)] == before


def test_a_run_as_the_model_lends_no_dropout(train, gpt2, tmp_path):
    first = train(model={"name_or_path": gpt2, "dropout": 0.5}, max_steps=1, output_dir=tmp_path / "first")
    second = train(model=str(first.output_path), max_steps=1, output_dir=tmp_path / "second")
    assert [luthier.Recipe.load(run.output_path / "recipe.yaml").model.dropout for run in (first, second)] == [
        0.5,
        None,
    ]


def test_a_model_without_dropout_refuses_a_rate_before_a_folder_appears(train, tmp_path):
    MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1)).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    with expect_error("recipe-conflict", "model.dropout"):
        train(model={"name_or_path": str(tmp_path / "m"), "dropout": 0.1}, adapter="full")
    assert not (tmp_path / "run").exists()


def test_a_reference_of_its_own_takes_no_dropout(train, gpt2):
    with expect_error("recipe-conflict", "reference.model.dropout"):
        train(loss="dpo", reference={"model": {"name_or_path": gpt2, "dropout": 0.1}})
