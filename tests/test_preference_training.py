"""Each preference loss trains: the margin grows, the rewards begin at 0, and a cut run goes on to the bit."""

import json
import math
import os
import re
import signal
from pathlib import Path

import luthier
import pytest
import torch
import transformers
from luthier.runs.writing.active_run import Interrupted
from luthier.testing import expect_error
from luthier.testing.worlds import save_tiny_model

from tests.preference_proof import distinct_pairs, divide

LOSSES = {
    "dpo": {"name": "dpo"},
    "orpo": {"name": "orpo", "beta": 1.0},
    "simpo": {"name": "simpo"},
    "cpo": {"name": "cpo"},
    "kto": {"name": "kto", "beta": 0.5},
    "aot": {"name": "dpo", "loss_type": ["aot", "sft"]},
    "reward_margin": {"name": "reward_margin"},
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory):
    """`rows_of(loss)`: a file of eight pairs, or of the same answers judged one by one."""
    folder = tmp_path_factory.mktemp("preferences")
    pairs = [
        {"prompt": f"{i} and {i % 3}?", "chosen": f"{i + i % 3}." * (1 + i % 2), "rejected": "no", "margin": 0.25 * i}
        for i in range(8)
    ]
    judged = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    for name, written in (("pairs", pairs), ("judged", judged)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    return lambda name: str(folder / ("judged.jsonl" if name == "kto" else "pairs.jsonl"))


@pytest.fixture
def prefer(train, rows_of):
    def run(name, **changes):
        return train(data=rows_of(name), loss=LOSSES[name], max_steps=6, save_steps=2, global_batch_size=8, **changes)

    return run


def logged(run):
    return [json.loads(line) for line in (run.output_path / "metrics.jsonl").read_text().splitlines()]


@every_loss
def test_the_margin_grows(prefer, name):
    lines = logged(prefer(name))
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"] + 0.01
    assert {"rewards/chosen", "rewards/rejected"} <= lines[0].keys()
    assert ({"logps/chosen", "logps/rejected"} <= lines[0].keys()) == (name != "reward_margin")
    assert ("rewards/accuracies" in lines[0]) == (name != "kto")


def test_dpo_begins_at_the_logarithm_of_two_without_a_margin(prefer):
    first = logged(prefer("dpo"))[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert first["rewards/accuracies"] <= 0.5


@pytest.fixture(scope="module")
def leaking(tmp_path_factory):
    """A GPT-2 whose config asks for dropout."""
    drops = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    return str(save_tiny_model(tmp_path_factory.mktemp("leaking") / "model", "gpt2", **drops))


@every_loss
def test_nothing_is_dropped_in_a_preference_loss_unless_the_recipe_asks(prefer, leaking, tmp_path, name):
    def losses(folder, model, adapter):
        return prefer(name, model=model, adapter=adapter, output_dir=tmp_path / folder).loss_history

    quiet = losses("quiet", {"name_or_path": leaking, "dropout": 0.0}, {"name": "lora", "lora_dropout": 0.0})
    assert losses("unasked", leaking, "lora") == quiet
    assert losses("adapter's", leaking, {"name": "lora", "lora_dropout": 0.3}) != quiet
    assert losses("model's", {"name_or_path": leaking, "dropout": 0.3}, "lora") != quiet


def test_sft_drops_what_model_and_adapter_drop_by_default(train, leaking, tmp_path):
    def losses(folder, model, adapter):
        return train(model=model, adapter=adapter, max_steps=2, output_dir=tmp_path / folder).loss_history

    usual = losses("usual", leaking, "lora")
    assert usual == losses("said", {"name_or_path": leaking, "dropout": 0.3}, {"name": "lora", "lora_dropout": 0.05})
    assert usual != losses("still", {"name_or_path": leaking, "dropout": 0.0}, "lora")
    assert usual != losses("whole", leaking, {"name": "lora", "lora_dropout": 0.0})


@every_loss
def test_a_cut_run_goes_on_to_the_bit(prefer, tmp_path, name):
    dropping = {"name": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}
    straight = prefer(name, adapter=dropping, output_dir=tmp_path / "straight")

    def terminate(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        prefer(name, adapter=dropping, exact_callbacks=["jsonl", luthier.on(step_ended=terminate)])
    assert caught.value.step == 3
    resumed = prefer(name, adapter=dropping)
    assert resumed.loss_history == straight.loss_history
    ours, theirs = (dict(run.model.named_parameters()) for run in (resumed, straight))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_reward_is_a_logit_of_the_saved_model_and_tells_the_pairs_apart(train, rows_of):
    file = rows_of("reward")
    run = train(data=file, loss={"name": "reward", "token": 5}, adapter="full", max_steps=30, learning_rate=3e-3)
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    model = transformers.AutoModelForCausalLM.from_pretrained(run.artifact)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.artifact)

    def reward(row, side):
        ids = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token, return_tensors="pt").input_ids
        return float(model(ids).logits[0, -1, 5].detach())

    assert all(reward(row, "chosen") > reward(row, "rejected") for row in rows)


def test_a_row_without_its_margin_is_refused_by_name(train, tmp_path):
    file = tmp_path / "bare.jsonl"
    file.write_text(json.dumps({"prompt": "1?", "chosen": "1.", "rejected": "no"}) + "\n")
    with pytest.raises(luthier.LuthierError, match="margin"):
        train(data=str(file), loss="reward_margin", max_steps=1)


@pytest.mark.parametrize("apart", ["pair", "prompt"])
def test_the_proof_holds_out_what_it_does_not_train_on(tmp_path, apart):
    rows = [{"prompt": f"{i % 5}?", "chosen": f"{i % 9}", "rejected": f"{i % 2}"} for i in range(60)]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:7]]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *turned]))
    found = distinct_pairs(path)
    kept, held = divide(found, apart, 0.4, 0)
    assert (
        len({(r["prompt"], *sorted((r["chosen"], r["rejected"]))) for r in found})
        == len(found)
        == len(kept) + len(held)
    )
    shown = [
        {(r["prompt"], *(() if apart == "prompt" else (r["chosen"], r["rejected"]))) for r in side}
        for side in (kept, held)
    ]
    assert shown[0].isdisjoint(shown[1])
    assert all(shown)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "kto", "aot"])
def test_every_unit_is_trained_on_as_often_as_there_are_epochs_when_the_batch_changes(train, rows_of, tmp_path, name):
    """Pairs, verdicts, and a loss that couples the batch."""
    stops = luthier.on(step_ended=lambda run: run.step == 3 and os.kill(os.getpid(), signal.SIGTERM))
    shared = {"data": rows_of(name), "loss": LOSSES[name], "num_train_epochs": 3, "output_dir": tmp_path / "run"}
    with pytest.raises(Interrupted):
        train(**shared, global_batch_size=3, exact_callbacks=["jsonl", stops])
    run = train(**shared, global_batch_size=5, exact_callbacks=["jsonl"], allow_changed="settings")
    assert run.samples_seen == 3 * (16 if name == "kto" else 8)


QUESTION = {"prompt": "2?", "completion": "two"}
ELSEWHERE = {  # rows that a loss does not take, and a loss that their error names
    "pairs for sft": ("sft", {"prompt": "2?", "chosen": "two", "rejected": "three"}, ("dpo",)),
    "answers for dpo": ("dpo", QUESTION, ("sft",)),
    "pairs for kto": ("kto", {"prompt": "2?", "chosen": "two", "rejected": "three"}, ("dpo",)),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_rows_of_another_kind_are_refused_with_the_losses_that_fit_them(train, case, tmp_path):
    loss, row, fitting = ELSEWHERE[case]
    with expect_error("data-format", "data") as caught:
        train(data=[row] * 4, loss=loss, max_steps=1)
    named = re.split(r"\W+", caught.value.remedy.partition("takes these")[2])
    assert set(fitting) <= set(named) and loss not in named
    assert not (tmp_path / "run").exists()


def test_answers_of_a_pair_share_positions_so_that_only_the_longer_must_fit(train, tmp_path):
    model = save_tiny_model(tmp_path / "model", "gpt2", n_positions=32)
    pairs = [{"prompt": "q" * 10, "chosen": "a" * 8 + str(i), "rejected": "b" * 8 + str(i)} for i in range(8)]
    assert train(model=str(model), data=pairs, loss="dpo", max_steps=1).steps == 1
    with expect_error("recipe-conflict", "data.max_length"):
        long = [{**row, "chosen": "a" * 40} for row in pairs]
        train(model=str(model), data=long, loss="dpo", max_steps=1, output_dir=str(tmp_path / "long"))
