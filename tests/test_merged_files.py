"""Merged models in the dtype and shards that are asked for: by the recipe at the run's end, or of the verb afterwards."""

import json

import pytest
import torch
from luthier.cli.app import app
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def command():
    def run(*args):
        return CliRunner().invoke(app, [str(a) for a in args])

    return run


def dtypes(folder):
    return {str(t.dtype) for file in folder.glob("*.safetensors") for t in load_file(file).values()}


def test_a_merged_model_is_written_as_the_recipe_says_and_as_the_verb_is_told(train, tmp_path, command, logits):
    run = train(max_steps=1, merge=True, save_dtype="bfloat16", max_shard_size="30KB")
    assert dtypes(run.merged) == {"torch.bfloat16"}
    assert dtypes(run.artifact) == {"torch.float32"}  # the adapter is as it was trained
    shards = len(list(run.merged.glob("*.safetensors")))
    assert shards > 1
    assert command("merge", run.output_path, "--output-dir", tmp_path / "again").exit_code == 0
    assert dtypes(tmp_path / "again") == {"torch.bfloat16"}
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == shards
    told = command("merge", run.output_path, "--output-dir", tmp_path / "whole", "--save-dtype", "float32",
                   "--max-shard-size", "1GB")  # fmt: skip
    assert told.exit_code == 0, told.stderr
    assert [p.name for p in (tmp_path / "whole").glob("*.safetensors")] == ["model.safetensors"]
    assert dtypes(tmp_path / "whole") == {"torch.float32"}
    assert json.loads((tmp_path / "whole/config.json").read_text())["dtype"] == "float32"
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.allclose(logits(whole), logits(run.model), atol=1e-4)


@pytest.mark.parametrize(
    ("flag", "value", "near"), [("--save-dtype", "bf16", "bfloat16"), ("--max-shard-size", "5", "5GB")]
)
def test_what_is_no_dtype_or_size_is_refused_before_any_model_is_loaded(tmp_path, command, flag, value, near):
    done = command("merge", tmp_path, flag, value, "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.exit_code, error["code"]) == (2, "recipe-out-of-range")
    assert near in error["remedy"]
