"""Weights: the files of a dense model have the dtype and size that the recipe says, and say so themselves."""

import functools
import json

import luthier
import pytest
import torch
from luthier.model.weights.dense_files import Files, save_model
from luthier.testing import expect_error
from luthier.testing.worlds import save_tiny_model, tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROWS = [{"prompt": f"{i} and", "completion": f"{i}"} for i in range(8)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The same tiny model, its files in float32 and in bfloat16."""
    folder = tmp_path_factory.mktemp("bases")
    save_tiny_model(folder / "bfloat16")
    tiny_model().bfloat16().save_pretrained(folder / "bfloat16")
    return {"float32": str(save_tiny_model(folder / "float32")), "bfloat16": str(folder / "bfloat16")}


@pytest.fixture
def train(bases, tmp_path):
    settings = {
        "model": bases["float32"],
        "data": ROWS,
        "max_steps": 1,
        "exact_callbacks": [],
        "output_dir": tmp_path / "run",
    }
    return functools.partial(_train, settings)


def _train(settings, **changes):
    return luthier.train(**{**settings, **changes})


def written(folder):
    """Every tensor of a model folder by name, read from its files."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def dtypes(folder):
    return {str(t.dtype).removeprefix("torch.") for t in written(folder).values()}


def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("base", "asked", "found"), [
    ("float32", "auto", "float32"),
    ("bfloat16", "auto", "bfloat16"),
    ("bfloat16", "float32", "float32"),
    ("float32", "bfloat16", "bfloat16"),
    ("float32", "float16", "float16"),
])  # fmt: skip
def test_files_have_the_dtype_asked_for_and_the_config_agrees(train, bases, base, asked, found):
    run = train(model=bases[base], save_dtype=asked)
    assert dtypes(run.artifact) == {found}
    assert config(run.artifact)["dtype"] == found
    assert AutoModelForCausalLM.from_pretrained(run.artifact, dtype="auto").dtype == getattr(torch, found)


@pytest.mark.parametrize(("base", "asked", "told"), [
    ("bfloat16", "auto", "warning"),
    ("bfloat16", "bfloat16", "info"),
    ("bfloat16", "float32", None),
    ("float32", "auto", None),
])  # fmt: skip
def test_weights_that_the_files_round_are_told_of_and_loudest_where_nobody_asked(
    train, bases, base, asked, told, tmp_path
):
    train(model=bases[base], save_dtype=asked)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    rounded = [line["level"] for line in lines if line["event"].startswith("weights are rounded")]
    assert rounded == ([told] if told else [])


def test_a_shard_is_no_larger_than_asked_and_transformers_finds_them_all(train, tmp_path):
    run = train(max_shard_size="50KB")
    files = sorted(run.artifact.glob("*.safetensors"))
    index = json.loads((run.artifact / "model.safetensors.index.json").read_text())
    tensors = written(run.artifact)
    assert len(files) > 2
    for file in files:
        held = load_file(file)
        assert sum(t.numel() * t.element_size() for t in held.values()) <= 50_000 or len(held) == 1
        assert all(index["weight_map"][name] == file.name for name in held)
    assert index["weight_map"].keys() == tensors.keys()
    again = AutoModelForCausalLM.from_pretrained(run.artifact)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), again.parameters(), strict=True))
    assert sorted(p.name for p in train(output_dir=tmp_path / "one").artifact.glob("*.safetensors")) == [
        "model.safetensors"
    ]


def test_a_weight_that_a_dtype_cannot_hold_is_refused_before_the_first_step(train, tmp_path, bases):
    model = AutoModelForCausalLM.from_pretrained(bases["float32"])
    model.model.embed_tokens.weight.data[-1] = 1e6  # of a token that no row has
    save_tiny_model(tmp_path / "large")
    model.save_pretrained(tmp_path / "large")
    with expect_error("artifact-dtype", "save_dtype"):
        train(model=str(tmp_path / "large"), save_dtype="float16")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_weights_outgrow_their_files_goes_on_with_another_dtype(train, bases):
    settings = {"model": AutoModelForCausalLM.from_pretrained(bases["float32"]), "tokenizer": tiny_tokenizer()}
    weight = settings["model"].model.embed_tokens.weight
    grow = luthier.on(step_ended=lambda: weight.data[-1].fill_(1e6))
    with expect_error("artifact-dtype", "save_dtype"):
        train(**settings, max_steps=2, save_dtype="float16", exact_callbacks=[grow])
    steps = []
    watch = luthier.on(step_started=lambda step: steps.append(step))  # noqa: PLW0108
    again = {**settings, "model": AutoModelForCausalLM.from_pretrained(bases["float32"]), "max_steps": 2}
    run = train(**again, save_dtype="bfloat16", allow_changed="settings", exact_callbacks=[watch])
    assert (steps, dtypes(run.artifact)) == ([], {"bfloat16"})


def test_shared_weights_stay_shared_in_another_dtype(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    save_model(model, tmp_path, Files(dtype=torch.bfloat16))
    assert "lm_head.weight" not in written(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()


def test_what_an_architecture_keeps_in_float32_stays_so(tmp_path):
    model = tiny_model()
    model._keep_in_fp32_modules_strict = {"norm"}
    save_model(model, tmp_path, Files(dtype=torch.bfloat16))
    kept = {name for name, tensor in written(tmp_path).items() if tensor.dtype == torch.float32}
    assert kept == {"model.norm.weight"}
    assert config(tmp_path)["dtype"] == "bfloat16"


def test_the_model_in_memory_stays_as_it_is(tmp_path):
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    save_model(model, tmp_path, Files(dtype=torch.bfloat16))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.config.dtype in (torch.float32, "float32")


def test_a_note_of_before_there_was_a_choice_means_the_weights_as_they_are():
    assert Files.of_note({}) == Files()
    chosen = Files(dtype=torch.bfloat16, max_shard_size="1GB", asked=True)
    assert Files.of_note({"files": json.loads(json.dumps(chosen.plain()))}) == chosen


def test_an_artifact_may_be_read_by_whoever_may_read_its_folder(train):
    artifact = train().artifact
    assert {path.stat().st_mode & 0o777 for path in artifact.iterdir()} == {artifact.stat().st_mode & 0o666}
