"""`outside.ternary`: layers that are trained in their quantizer's form, through the command line, on real rows."""

import json
import os
import signal
import time

import luthier
import pytest
import torch
import yaml
from luthier.cli.app import app
from luthier.plugins.registry import installed_plugins
from luthier.runs.writing.record import read_record
from luthier.testing import checks_for
from luthier.testing.ranks import in_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

STEPS = 4
ADAPTERS = {"full": "full", "lora": {"name": "lora", "r": 4, "target_modules": "all-linear"}}


@pytest.fixture(autouse=True)
def ternary(install_outside):
    install_outside("ternary")


@pytest.fixture
def recipe(tmp_path):
    """`recipe(output, adapter, **changes)`: the path of a recipe over rows of GSM8K and the embedded model."""
    data = os.path.expandvars("${LUTHIER_DATA}/gsm8k/train.jsonl.gz")
    if not os.path.exists(data):
        pytest.skip("LUTHIER_DATA has no gsm8k")

    def write(output, adapter="full", **changes):
        source = {"path": data, "columns": {"prompt": "question", "completion": "answer"}, "max_rows": 24}
        settings = {
            "model": "demo",
            "data": {"train": [source], "validation": 0.25, "max_length": 224},
            "adapter": ADAPTERS[adapter],
            "quantizer": {"name": "outside.ternary", "ramp": 0.5},
            "exact_callbacks": ["jsonl"],
            "global_batch_size": 4,
            "max_tokens_per_device": 256,
            "max_steps": STEPS,
            "eval_steps": 2,
            "save_steps": 1,
            "learning_rate": 1e-3,
            "num_threads": 1,
            "memory_check": False,
            "device": "cpu",
            "output_dir": str(tmp_path / output),
            **changes,
        }
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def command(*words):
    """`luthier ... --json` in this process."""
    found = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert found.exit_code == 0, found.stderr
    return json.loads(found.stdout or "{}")  # of several ranks the first alone prints


def trained(path):
    """Train through the command line; gives the losses, on the first rank."""
    return command("train", path).get("loss_history")


def killed(path, ranks):
    """Train in processes of their own, and kill them once the second checkpoint is there."""
    folder = yaml.safe_load(path.read_text())["output_dir"]
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        try:
            in_ranks(ranks, trained, path, joined=ranks == 1) if ranks > 1 else trained(path)
        finally:
            os._exit(0)
    until = time.monotonic() + 120
    while not os.path.exists(f"{folder}/checkpoints/step-00000002/manifest.json"):
        assert time.monotonic() < until, "no checkpoint"
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert read_record(path.parent / path.stem)["state"] == "running"


def tensors(folder):
    (path,) = [p for name in ("adapter", "model") for p in (folder / name).glob("*.safetensors")]
    return load_file(path)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_passes_the_kit():
    offer = installed_plugins().get("quantizer", "outside.ternary")
    for check in checks_for(offer.record):
        check()


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_it_trains_is_killed_and_resumed_to_the_bit(recipe, tmp_path, adapter, packing):
    straight = trained(recipe("straight", adapter, packing=packing))
    assert len(set(straight)) == STEPS
    broken = recipe("broken", adapter, packing=packing)
    killed(broken, 1)
    assert trained(broken) == straight
    assert same(tensors(tmp_path / "broken"), tensors(tmp_path / "straight"))


@pytest.mark.parametrize(
    ("adapter", "strategy"),
    [("full", "fsdp"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("full", "ddp"), ("lora", "fsdp")))],
)
def test_two_ranks_train_it_alike_and_are_resumed_to_the_bit(recipe, tmp_path, adapter, strategy):
    alone = trained(recipe("alone", adapter))
    spread = {"distributed": {"strategy": strategy}}
    straight, _ = in_ranks(2, trained, recipe("straight", adapter, **spread), joined=False)
    assert straight == pytest.approx(alone, rel=1e-3)
    broken = recipe("broken", adapter, **spread)
    killed(broken, 2)
    again, _ = in_ranks(2, trained, broken, joined=False)
    assert again == straight
    assert same(tensors(tmp_path / "broken"), tensors(tmp_path / "straight"))


def test_the_artifact_of_full_is_generated_from_evaluated_and_merged(recipe, tmp_path):
    path = recipe("run")
    trained(path)
    note = json.loads((tmp_path / "run/model/luthier.json").read_text())
    assert (note["artifact"], note["progress"]["step"]) == ("quantized", STEPS)
    answers = {command("generate", folder, "How many?", "--max-new-tokens", "4")["text"] for folder in
               (tmp_path / "run", tmp_path / "run/model")}  # fmt: skip
    run = luthier.train(path)
    assert answers == {run.generate("How many?", max_new_tokens=4)}
    assert run.evaluate() == pytest.approx(run.eval_metrics, rel=1e-6)
    command("merge", tmp_path / "run", "--save-dtype", "float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged")
    weight = plain.model.layers[0].self_attn.q_proj.weight.detach()
    assert weight.unique().numel() == 3


def test_what_lora_trained_on_ternary_weights_is_generated_from_and_merged(recipe, tmp_path):
    trained(recipe("run", "lora", merge=True))
    answer = command("generate", tmp_path / "run", "How many?", "--max-new-tokens", "4")["text"]
    merged = command("generate", tmp_path / "run/merged", "How many?", "--max-new-tokens", "4")["text"]
    assert answer == merged


def test_a_trained_model_is_planned_with_and_trained_on(recipe, tmp_path):
    trained(recipe("first"))
    base = str(tmp_path / "first/model")
    further = recipe("second", "lora", model=base)
    assert command("plan", further)["notes"] == []
    assert trained(further)
    assert command("generate", tmp_path / "second", "How many?", "--max-new-tokens", "2")
    refused = CliRunner().invoke(app, ["train", str(recipe("third", model=base, quantizer="none"))])
    assert refused.exit_code == 2 and "was trained in the form of quantizer" in refused.stderr


def test_a_plan_rehearses_it(recipe):
    found = command("plan", recipe("run"))
    assert found["notes"] == [] and found["memory"]["optimizer"] > 0
