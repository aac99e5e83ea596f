"""ORPO, KTO and InfoNCE from packages of their own: trained by the command, killed, resumed, spread, and TRL's numbers."""

import json
import os
import signal
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import luthier
import pytest
import torch
from luthier.cli.app import app
from luthier.data.batches.batch import collate_examples
from luthier.data.examples import TokenExample
from luthier.model.attention import install_attention
from luthier.model.policy import ModelPolicy
from luthier.plugins.registry import installed_plugins
from luthier.runs.writing.record import read_record
from luthier.step.losses.loss_output import weigh_output
from luthier.testing.checks import checks_for
from luthier.testing.ranks import in_ranks
from luthier.testing.worlds import tiny_model
from safetensors.torch import load_file
from typer.testing import CliRunner

NAMES = ("orpo", "kto", "infonce")
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def packages(install_outside):
    install_outside(*NAMES)


@pytest.fixture(scope="module")
def real_rows(tmp_path_factory):
    """Real rows of each kind: pairs and judged answers of PandaLM, questions and answers of GSM8K."""
    folder = Path(os.environ.get("LUTHIER_DATA", "none"))
    if not folder.is_dir():
        pytest.skip("no real data: set LUTHIER_DATA to the folder of data sets")
    pairs = [json.loads(line) for line in (folder / "pandalm/derived_pairs.jsonl").read_text().splitlines()]
    sides = ("prompt", "chosen", "rejected")
    short = [r for r in pairs if all(isinstance(r[s], str) and 0 < len(r[s]) < 160 for s in sides)][:16]
    judged = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in short
        for side in ("chosen", "rejected")
    ][:16]
    written = tmp_path_factory.mktemp("rows")
    for name, rows in (("pairs", short), ("judged", judged)):
        (written / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = {"query": "question", "passage": "answer"}
    gsm8k = {"path": str(folder / "gsm8k/test.jsonl"), "columns": questions, "max_rows": 16}
    sources = {"orpo": {"path": str(written / "pairs.jsonl")}, "kto": {"path": str(written / "judged.jsonl")}}
    return {**sources, "infonce": gsm8k}


@pytest.fixture
def settings_of(real_rows, tmp_path):
    def settings(name, **changes):
        return {
            "model": "demo",
            "data": {"train": [real_rows[name]], "max_length": 400},
            "adapter": {"name": "lora", "r": 4},
            "loss": f"outside.{name}",
            "exact_callbacks": ["jsonl"],
            "global_batch_size": 4,
            "learning_rate": 2e-3,
            "max_steps": 4,
            "save_steps": 1,
            "max_tokens_per_device": 1300,
            "num_threads": 1,
            "precision": "float32",
            "memory_check": False,
            "output_dir": str(tmp_path / "run"),
            **changes,
        }

    return settings


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
    settings = settings_of(name, packing=packing)
    expected = losses({**settings, "output_dir": str(tmp_path / "straight")})
    assert len(set(expected)) == 4
    killed_after(2, settings)
    assert read_record(tmp_path / "run")["state"] != "completed"
    assert losses(settings) == expected
    ours, theirs = (load_file(tmp_path / folder / WEIGHTS) for folder in ("run", "straight"))
    assert ours and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", NAMES)
def test_packing_and_ranks_change_no_loss(settings_of, tmp_path, name):
    adapter = {"name": "lora", "r": 4, "lora_dropout": 0.0}
    exact = {"adapter": adapter, "optimizer": {"name": "sgd", "momentum": 0.9}, "learning_rate": 0.05}
    packed = losses(settings_of(name, **exact, output_dir=str(tmp_path / "packed")))
    apart = losses(settings_of(name, **exact, packing=False, output_dir=str(tmp_path / "apart")))
    assert packed == pytest.approx(apart, rel=1e-4)
    spread = settings_of(name, **exact, distributed={"strategy": "ddp"}, output_dir=str(tmp_path / "ddp"))
    assert losses(spread, 2) == pytest.approx(packed, rel=1e-4)


class Dying:
    """Every process is killed after a step."""

    every_rank = True

    @luthier.event
    def step_ended(self, run, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", ["orpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kto", "infonce"))])
def test_two_ranks_resume_bit_for_bit_after_a_kill(settings_of, tmp_path, name):
    settings = settings_of(name, distributed={"strategy": "ddp"})
    expected = losses({**settings, "output_dir": str(tmp_path / "straight")}, 2)
    dying = {**settings, "exact_callbacks": ["jsonl", Dying()]}
    with pytest.raises(AssertionError, match="ranks ended with"):
        in_ranks(2, lambda: luthier.train(**dying).loss_history)
    assert losses(settings, 2) == expected


@pytest.mark.slow
def test_orpo_trains_on_long_reasoning_pairs(settings_of, tmp_path):
    rows = Path(os.environ["LUTHIER_DATA"]) / "fireworks_orpo_ifeval/orpo_ifeval.jsonl.gz"
    data = {"train": [str(rows)], "max_length": 1500}
    found = losses(settings_of("orpo", data=data, max_steps=2, global_batch_size=2, max_tokens_per_device=3000))
    assert all(loss > 0 for loss in found)


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_laws_of_losses(name):
    import unittest

    record = installed_plugins().get("loss", f"outside.{name}").record
    ran = []
    for check in checks_for(record):
        try:
            check()
            ran.append(check.name)
        except unittest.SkipTest as reason:
            assert str(reason).startswith("<loss 'outside."), reason
    assert {"adds_up_over_micro_batches", "takes_idle_batches", "agrees_on_a_model"} <= set(ran)


class Exact(torch.Tensor):
    """Float64 that stays so where TRL rounds its log-probabilities to float32."""

    def float(self):
        return self.as_subclass(torch.Tensor)


def padded(rows, value):
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], True, value)


def random_sides(count, prompts):
    """[(ids, labels)]: an answer of its own after each prompt."""
    chance = torch.Generator().manual_seed(count + len(prompts))
    sides = []
    for prompt in prompts:
        answer = torch.randint(7, 260, (3 + len(sides) % 4,), generator=chance).tolist()
        sides.append((prompt + answer, [-100] * len(prompt) + answer))
    return sides


def example(documents, **about):
    import numpy as np

    parts = {
        name: TokenExample(input_ids=np.array(ids, np.int32), labels=np.array(labels, np.int32), **about)
        for name, (ids, labels) in documents.items()
    }
    return TokenExample.joined(parts)


def exact_model(seed=0):
    return tiny_model(seed=seed).double().eval()


def objective_and_gradient(loss, batch, model, reference=None):
    """Our objective over one global batch, and the gradient of every weight."""
    from contextlib import nullcontext

    install_attention(model)
    policy = ModelPolicy(model)
    if reference is not None:
        install_attention(reference)
        policy.others["reference"] = ModelPolicy(reference, frozen=nullcontext)
    total = weigh_output(loss(policy, batch), loss.terms(batch))
    total.backward()
    return float(total), {name: p.grad for name, p in model.named_parameters()}


def assert_gradients_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))


def test_orpo_has_trls_value_and_gradient():
    """TRL computes the log odds in float32; without that rounding both agree."""
    from luthier_outside_orpo import Orpo
    from luthier_outside_orpo.loss import OrpoLoss
    from trl.experimental.orpo import ORPOTrainer

    prompts = [[1, 9 + i, 30, 41 + i][: 2 + i % 3] for i in range(5)]
    sides = {"chosen": random_sides(5, prompts), "rejected": random_sides(6, prompts)}
    units = [example({name: rows[i] for name, rows in sides.items()}) for i in range(5)]
    ours = objective_and_gradient(OrpoLoss(Orpo(beta=0.3)), collate_examples(units), exact_model())

    trainer = object.__new__(ORPOTrainer)
    state = {"is_encoder_decoder": False, "aux_loss_enabled": False, "padding_value": 0, "beta": 0.3,
             "accelerator": SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value)}  # fmt: skip
    trainer.__dict__.update(state)
    trainer.odds_ratio_loss = lambda *sides: ORPOTrainer.odds_ratio_loss(
        trainer, *(s.as_subclass(Exact) for s in sides)
    )
    given = {}
    for name, rows in sides.items():
        given[f"{name}_input_ids"] = padded([ids for ids, _ in rows], 0)
        given[f"{name}_attention_mask"] = padded([[1] * len(ids) for ids, _ in rows], 0)
        given[f"{name}_labels"] = padded([labels for _, labels in rows], -100)
    model = exact_model()
    total, _ = trainer.get_batch_loss_metrics(model, given)
    total.backward()
    assert ours[0] == pytest.approx(float(total), rel=1e-9)
    assert_gradients_equal(ours[1], {name: p.grad for name, p in model.named_parameters()})


class FusedHead(torch.nn.Module):
    """The model as TRL's trainer patches it: log-probabilities and entropy of the labels in the place of logits."""

    is_gradient_checkpointing = False

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels, use_cache=False, fused_lm_head=True):
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
        logprobs, targets = logits.log_softmax(-1), labels[:, 1:]
        own = logprobs.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        own = torch.where(targets >= 0, own, 0.0)
        return SimpleNamespace(log_probs=own, entropy=entropy, mean_logits=logits.mean(-1))


def test_kto_has_trls_value_and_gradient_with_its_mismatched_pairs():
    from luthier.step.losses.unit_layout import UnitLayout
    from luthier_outside_kto import Kto
    from luthier_outside_kto.loss import KtoLoss
    from trl import KTOTrainer

    prompts = [[1, 9 + i, 30, 41 + i][: 2 + i % 3] for i in range(5)]
    sides, labels = random_sides(7, prompts), [True, False, False, True, True]
    units = [example({"text": side}, columns={"label": label}, index=i) for i, (side, label) in
             enumerate(zip(sides, labels, strict=True))]  # fmt: skip
    loss = KtoLoss(Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5))
    laid = UnitLayout(max_length=100, arrange=loss.arrange).lay_out(units).examples
    ours = objective_and_gradient(loss, collate_examples(laid), exact_model(), exact_model(1))

    answers = [ids[len(prompt) :] for (ids, _), prompt in zip(sides, prompts, strict=True)]
    mismatched = [p + a for p, a in zip(prompts, answers[-1:] + answers[:-1], strict=True)]
    masks = [
        [0] * len(p) + [1] * (len(ids) - len(p)) for p, ids in zip(prompts * 2, [s[0] for s in sides] + mismatched)
    ]
    given = {
        "input_ids": padded([ids for ids, _ in sides], 0), "completion_mask": padded(masks[:5], 0),
        "attention_mask": padded([[1] * len(ids) for ids, _ in sides], 0),
        "KL_input_ids": padded(mismatched, 0), "KL_completion_mask": padded(masks[5:], 0),
        "KL_attention_mask": padded([[1] * len(ids) for ids in mismatched], 0), "label": torch.tensor(labels),
    }  # fmt: skip
    model, trainer = exact_model(), object.__new__(KTOTrainer)
    trainer.__dict__.update(
        model=FusedHead(model), ref_model=FusedHead(exact_model(1)), calculate_KL=True, aux_loss_enabled=False,
        precompute_ref_logps=False, loss_type="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value), _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, device="cpu"),
        _metrics={mode: defaultdict(list) for mode in ("train", "eval")},
    )  # fmt: skip
    total = trainer._compute_loss(trainer.model, given, return_outputs=False)
    total.backward()
    assert ours[0] == pytest.approx(float(total), rel=1e-9)
    assert_gradients_equal(ours[1], {name: p.grad for name, p in model.named_parameters()})
