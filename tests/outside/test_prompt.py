"""Prompt and prefix tuning from a package of its own: trained by the command, killed, resumed, and PEFT's numbers."""

import json
import os
import signal
import time
from pathlib import Path

import luthier
import pytest
import torch
from luthier.cli.app import app
from luthier.model.attention import install_attention
from luthier.model.policy import ModelPolicy
from luthier.plugins.registry import installed_plugins
from luthier.runs.writing.record import read_record
from luthier.step.opened import open_artifact
from luthier.testing import expect_error
from luthier.testing.checks import checks_for
from luthier.testing.contexts import context
from luthier.testing.exactness import unrounded
from luthier.testing.ranks import in_ranks
from luthier.testing.worlds import random_batch, save_tiny_model, tiny_model
from safetensors.torch import load_file
from typer.testing import CliRunner

KINDS = ("outside.prompt", "outside.prefix")
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture
def gsm8k():
    folder = os.environ.get("LUTHIER_DATA", "")
    if not os.path.isdir(folder):
        pytest.skip("no real data: set LUTHIER_DATA to the folder of data sets")
    return f"{folder}/gsm8k/test.jsonl"


@pytest.fixture
def settings(install_outside, model_folder, gsm8k, tmp_path):
    install_outside("prompt")
    rows = {"path": gsm8k, "columns": {"prompt": "question", "completion": "answer"}, "max_rows": 24}
    return {
        "model": str(model_folder),
        "data": {"train": [rows], "max_length": 500, "overlong": "truncate"},
        "adapter": {"name": "outside.prompt", "num_virtual_tokens": 4},
        "exact_callbacks": ["jsonl"],
        "global_batch_size": 8,
        "learning_rate": 0.2,
        "max_steps": 6,
        "save_steps": 2,
        "max_tokens_per_device": 1200,
        "num_threads": 1,
        "precision": "float32",
        "memory_check": False,
        "output_dir": str(tmp_path / "run"),
    }


def command(settings):
    """The command `luthier train` in this process, its settings in a recipe. Rank 0 writes what came of it."""
    recipe = f"{settings['output_dir']}.json"
    with open(recipe, "w") as file:
        json.dump(settings, file)
    result = CliRunner().invoke(app, ["train", recipe, "--json"])
    assert result.exit_code == 0, result.output


def losses(settings, ranks=1):
    if ranks == 1:
        command(settings)
    else:
        in_ranks(ranks, command, settings)
    return read_record(Path(settings["output_dir"]))["result"]["loss_history"]


def killed_after(step, settings):
    """The command in a process that is killed once the step is logged."""
    child = os.fork()
    if not child:
        try:
            command(settings)
        finally:
            os._exit(1)
    lines, deadline = Path(settings["output_dir"]) / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline:
        if lines.exists() and lines.read_text().count("\n") >= step:
            break
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_the_command_trains_it_and_resumes_bit_for_bit_after_a_kill(settings, tmp_path, name, packing):
    settings = {**settings, "adapter": {"name": name, "num_virtual_tokens": 4}, "packing": packing}
    straight = {**settings, "output_dir": str(tmp_path / "straight")}
    expected = losses(straight)
    assert sum(expected[3:]) < sum(expected[:3]) - 0.02  # the second pass over the rows
    killed_after(3, settings)
    assert read_record(tmp_path / "run")["state"] != "completed"
    assert losses(settings) == expected
    ours, theirs = (load_file(tmp_path / folder / WEIGHTS) for folder in ("run", "straight"))
    assert ours.keys() == {"prompt_embeddings"} and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", KINDS)
def test_packing_and_ranks_change_no_loss(settings, tmp_path, name):
    settings = {**settings, "adapter": {"name": name, "num_virtual_tokens": 4}, "max_steps": 3}
    packed = losses({**settings, "output_dir": str(tmp_path / "packed")})
    apart = losses({**settings, "packing": False, "output_dir": str(tmp_path / "apart")})
    assert packed == pytest.approx(apart, rel=1e-5)
    for strategy in ("ddp", "fsdp"):
        spread = {**settings, "distributed": {"strategy": strategy}, "output_dir": str(tmp_path / strategy)}
        assert losses(spread, 2) == pytest.approx(packed, rel=1e-5)


class Dying:
    """Every process is killed after a step."""

    every_rank = True

    @luthier.event
    def step_ended(self, run, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_resume_bit_for_bit_after_a_kill(settings, tmp_path, name):
    settings = {**settings, "adapter": {"name": name, "num_virtual_tokens": 4}, "distributed": {"strategy": "ddp"}}
    expected = losses({**settings, "output_dir": str(tmp_path / "straight")}, 2)
    dying = {**settings, "exact_callbacks": ["jsonl", Dying()]}
    with pytest.raises(AssertionError, match="ranks ended with"):
        in_ranks(2, lambda: luthier.train(**dying).loss_history)
    assert losses(settings, 2) == expected
    ours, theirs = (load_file(tmp_path / folder / WEIGHTS) for folder in ("run", "straight"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", KINDS)
def test_its_answers_and_logits_are_those_of_peft_for_the_same_files(settings, tmp_path, name):
    """PEFT 0.21's own `generate` loses the prompt from transformers 5.24 on; its forward is asked token by token."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    command({**settings, "adapter": {"name": name, "num_virtual_tokens": 4}})
    question = "Ann has 2 apples and buys 3. How many has she?"
    found = luthier.generate(tmp_path / "run", question, max_new_tokens=12)
    base = AutoModelForCausalLM.from_pretrained(settings["model"], attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()
    opened = open_artifact(tmp_path / "run")
    ids = torch.tensor([opened.tokenizer(f"{question}").input_ids])
    asked = len(ids[0])
    for _ in range(12):
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert opened.tokenizer.decode(ids[0, asked:], skip_special_tokens=True).startswith(found) and found
    without = luthier.generate(settings["model"], question, max_new_tokens=12)
    assert found != without


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mistral"])
@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_those_of_peft_on_separate_documents(install_outside, name, architecture):
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    install_outside("prompt")
    record = installed_plugins().get("adapter", name).record
    adapter = installed_plugins().build(installed_plugins().get("adapter", name), record.options(num_virtual_tokens=5))
    model = tiny_model(architecture).double().eval()
    install_attention(model)
    adapter.attach(model, context(model))
    config = {"outside.prompt": PromptTuningConfig, "outside.prefix": PrefixTuningConfig}[name]
    base = tiny_model(architecture, attn_implementation="eager").double()
    theirs = get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=5)).double().eval()
    (weight,) = (p for n, p in theirs.named_parameters() if "prompt_encoder" in n)
    weight.data.copy_(adapter.weight.data)
    batch = random_batch((7, 12, 4), supervised=1.0)
    with unrounded():
        found = ModelPolicy(model, adapter).token_logprobs(batch)
        expected = []
        for ids in batch.input_ids.split(batch.lengths.tolist()):
            logits = theirs(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, -len(ids) :]
            expected += [logits.new_zeros(1), logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]]
        expected = torch.cat(expected)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        (found.exp().sum()).backward()
        (expected.exp().sum() - 3).backward()
    torch.testing.assert_close(adapter.weight.grad, weight.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_it_passes_the_kit(install_outside, name):
    install_outside("prompt")
    for check in checks_for(installed_plugins().get("adapter", name).record):
        check()


@pytest.mark.parametrize("name", KINDS)
def test_prompts_count_in_packing_memory_and_token_figures(settings, tmp_path, name):
    found = {}
    for tokens in (1, 60):
        changed = {
            **settings,
            "adapter": {"name": name, "num_virtual_tokens": tokens},
            "output_dir": str(tmp_path / f"{tokens}"),
        }
        changed["max_tokens_per_device"] = 1000
        plan = luthier.plan(**changed)
        run = luthier.train(**{**changed, "max_steps": 3})
        found[tokens] = plan.to_dict(), run.tokens_seen
    (few, seen_few), (many, seen_many) = found[1], found[60]
    assert many["schedule"]["tokens_per_epoch"] - few["schedule"]["tokens_per_epoch"] == 24 * 59
    assert seen_many - seen_few == 24 * 59  # an epoch, of which every row is a document
    assert many["packing"]["micro_batches_per_step"] > few["packing"]["micro_batches_per_step"]
    assert many["packing"]["largest_micro_batch"] <= 1000
    assert many["memory"]["activations"] > 1.02 * few["memory"]["activations"]


def test_auto_makes_room_for_the_prompt(settings):
    adapter = {"name": "outside.prompt", "num_virtual_tokens": 300}
    run = luthier.train(**{**settings, "adapter": adapter, "max_tokens_per_device": "auto", "max_steps": 1})
    assert read_record(run.output_path)["decisions"]["max_tokens_per_device"]["value"] >= 300 + 500


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_beyond_the_micro_batch_or_the_models_positions_is_refused(settings, tmp_path, name):
    adapter = {"name": name, "num_virtual_tokens": 400}
    for act in (luthier.plan, luthier.train):
        with expect_error("recipe-conflict", "max_tokens_per_device", "400"):
            act(**{**settings, "adapter": adapter, "max_tokens_per_device": 600})
    model = save_tiny_model(tmp_path / "gpt2", "gpt2")
    with expect_error("recipe-conflict", "data.max_length", "512"):
        luthier.train(**{**settings, "adapter": adapter, "model": str(model)})
    assert not (tmp_path / "run").exists()
