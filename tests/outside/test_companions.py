"""DPO from a trained adapter with a cached reference, and distillation from a live teacher, as packages of their own."""

import json
import math
import os
import signal
import time
import unittest
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from luthier.cli.app import app
from luthier.data.batches.batch import collate_examples
from luthier.data.examples import TokenExample
from luthier.model.attention import install_attention
from luthier.model.policy import ModelPolicy
from luthier.plugins.registry import installed_plugins
from luthier.runs.writing.record import read_record
from luthier.testing.checks import checks_for
from luthier.testing.ranks import in_ranks
from luthier.testing.worlds import tiny_model
from typer.testing import CliRunner

NAMES = ("dpo", "distill")


@pytest.fixture(autouse=True)
def packages(install_outside):
    install_outside(*NAMES)


@pytest.fixture(scope="module")
def real_rows(tmp_path_factory):
    """Pairs of PandaLM, and questions with answers of GSM8K."""
    folder = Path(os.environ.get("LUTHIER_DATA", "none"))
    if not folder.is_dir():
        pytest.skip("no real data: set LUTHIER_DATA to the folder of data sets")
    lines = (folder / "pandalm/derived_pairs.jsonl").read_text().splitlines()
    sides = ("prompt", "chosen", "rejected")
    rows = [
        row for row in map(json.loads, lines) if all(isinstance(row[s], str) and 0 < len(row[s]) < 160 for s in sides)
    ]
    pairs = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows[:16]))
    columns = {"prompt": "question", "completion": "answer"}
    return {
        "dpo": {"path": str(pairs)},
        "distill": {"path": str(folder / "gsm8k/test.jsonl"), "columns": columns, "max_rows": 16},
    }


def command(settings):
    """The command `luthier train` in this process, its settings in a recipe."""
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


@pytest.fixture
def settings_of(real_rows, tmp_path):
    """The settings of a run: DPO begins from an adapter that was trained before, with a cached reference."""
    fixed = {
        "model": "demo",
        "adapter": {"name": "lora", "r": 4, "lora_dropout": 0.0},
        "exact_callbacks": ["jsonl"],
        "global_batch_size": 4,
        "learning_rate": 0.05,
        "optimizer": {"name": "sgd", "momentum": 0.9},  # AdamW's first steps follow rounding
        "max_steps": 4,
        "save_steps": 1,
        "max_tokens_per_device": 1300,
        "num_threads": 1,
        "precision": "float32",
    }

    def settings(name, **changes):
        data = {"train": [real_rows[name]], "max_length": 400}
        own = {"teacher": "demo"} if name == "distill" else {"reference_cache": True, "adapter_from": first()}
        given = {"loss": f"outside.{name}", "data": data, "output_dir": str(tmp_path / "run")}
        return {**fixed, **given, **own, **changes}

    def first():
        folder = tmp_path / "first"
        if not folder.exists():
            data = {"train": [real_rows["distill"]], "max_length": 400}
            command({**fixed, "data": data, "learning_rate": 1.0, "max_steps": 2, "output_dir": str(folder)})
        return str(folder)

    return settings


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
@pytest.mark.parametrize("name", NAMES)
def test_the_command_trains_it_and_resumes_bit_for_bit_after_a_kill(settings_of, tmp_path, name, packing):
    settings = settings_of(name, packing=packing, adapter={"name": "lora", "r": 4, "lora_dropout": 0.1})
    expected = losses({**settings, "output_dir": str(tmp_path / "straight")})
    assert len(set(expected)) == 4
    killed_after(2, settings)
    assert read_record(tmp_path / "run")["state"] != "completed"
    assert losses(settings) == expected


@pytest.mark.parametrize("name", NAMES)
def test_packing_and_ranks_change_no_loss(settings_of, tmp_path, name):
    packed = losses(settings_of(name, output_dir=str(tmp_path / "packed")))
    apart = losses(settings_of(name, packing=False, output_dir=str(tmp_path / "apart")))
    assert packed == pytest.approx(apart, rel=1e-4)
    spread = settings_of(name, distributed={"strategy": "ddp"}, output_dir=str(tmp_path / "ddp"))
    assert losses(spread, 2) == pytest.approx(packed, rel=1e-4)
    if name == "dpo":
        assert packed[0] == pytest.approx(math.log(2), abs=1e-6)
        live = losses(settings_of(name, reference_cache=False, output_dir=str(tmp_path / "live")))
        assert packed == pytest.approx(live, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_laws_of_losses(name):
    ran = []
    for check in checks_for(installed_plugins().get("loss", f"outside.{name}").record):
        try:
            check()
            ran.append(check.name)
        except unittest.SkipTest as reason:
            assert str(reason).startswith("<loss 'outside."), reason
    assert {"adds_up_over_micro_batches", "takes_idle_batches", "agrees_on_a_model"} <= set(ran)


class FusedHead(torch.nn.Module):
    """The model as TRL's trainer patches it: log-probabilities and entropy of the labels in the place of logits."""

    is_gradient_checkpointing = False

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels, use_cache=False, fused_lm_head=True):
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
        logprobs, targets = logits.log_softmax(-1), labels[:, 1:]
        own = torch.where(targets >= 0, logprobs.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1), 0.0)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        top1 = logits.argmax(-1) == targets
        return SimpleNamespace(log_probs=own, entropy=entropy, mean_logits=logits.mean(-1), is_top1=top1)


def test_dpo_has_trls_value_and_gradient():
    from luthier_outside_dpo import Dpo
    from luthier_outside_dpo.loss import DpoLoss

    chance = torch.Generator().manual_seed(0)
    sides = [[torch.randint(7, 260, (n,), generator=chance).tolist() for n in (3 + i, 2 + i % 3, 4)] for i in range(4)]
    models = {name: tiny_model(seed=seed).double().eval() for name, seed in (("ours", 0), ("theirs", 0), ("before", 1))}
    expected = _trl_loss(models["theirs"], models["before"], sides)
    expected.backward()

    for name in ("ours", "before"):
        install_attention(models[name])
    policy = ModelPolicy(models["ours"])
    policy.others["reference"] = ModelPolicy(models["before"], frozen=nullcontext)
    loss, batch = DpoLoss(Dpo(beta=0.3)), collate_examples([_pair(*side) for side in sides])
    total = loss(policy, batch).sums["preference"] / loss.terms(batch)["preference"]
    total.backward()
    assert float(total) == pytest.approx(float(expected), rel=1e-9)
    for ours, theirs in zip(models["ours"].parameters(), models["theirs"].parameters(), strict=True):
        bound = 1e-9 * float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=bound)


def _pair(prompt, chosen, rejected):
    documents = {"chosen": chosen, "rejected": rejected}
    ignored = [-100] * len(prompt)
    return TokenExample.joined(
        {
            name: TokenExample(
                input_ids=np.array(prompt + answer, np.int32), labels=np.array(ignored + answer, np.int32)
            )
            for name, answer in documents.items()
        }
    )


def _trl_loss(model, reference, sides):
    """What TRL's trainer makes of these pairs, chosen answers first, padded on the right."""
    from trl import DPOTrainer

    rows = [(prompt, answers[place]) for place in (0, 1) for prompt, *answers in sides]
    given = {
        "input_ids": _padded([prompt + answer for prompt, answer in rows]),
        "attention_mask": _padded([[1] * len(prompt + answer) for prompt, answer in rows]),
        "completion_mask": _padded([[0] * len(prompt) + [1] * len(answer) for prompt, answer in rows]),
    }
    trainer = object.__new__(DPOTrainer)
    trainer.__dict__.update(
        model=FusedHead(model), ref_model=FusedHead(reference), aux_loss_enabled=False, ld_alpha=None, beta=0.3,
        precompute_ref_logps=False, f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0],
        label_smoothing=0.0, use_weighting=False, _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value, gather=lambda value: value),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, device="cpu"),
        _metrics={mode: defaultdict(list) for mode in ("train", "eval")},
    )  # fmt: skip
    return trainer._compute_loss(trainer.model, given, return_outputs=False)


def _padded(rows):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, 0)
