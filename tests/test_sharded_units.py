"""Pairs and coupled losses on two sharded ranks: they train and are evaluated as on one."""

import json

import luthier
import pytest
import torch
import transformers
from luthier.testing.ranks import in_ranks
from luthier.testing.worlds import save_tiny_model, tiny_tokenizer

LORA = {"name": "lora", "r": 4, "lora_dropout": 0.0}


class Spread:
    """The chosen answers' log-probabilities, squared around the mean of the whole global batch."""

    data, couples = "preference", "batch"

    def terms(self, batch):
        return {"spread": 1.0 * len(batch.pairs)}

    def scores(self, policy, batch):
        answers = batch.sum_by_document(policy.token_logprobs(batch))
        units = batch.documents("chosen")
        return answers[units], {"lengths": batch.lengths[units].to(answers)}

    def combine(self, scores, fixed):
        per_token = scores / fixed["lengths"]
        sums = {"spread": (per_token - per_token.mean()).square().sum() - per_token.sum()}
        return luthier.LossOutput(sums=sums, metrics={"per_token": (per_token.detach().sum(), len(scores))})

    def __call__(self, policy, batch):
        return self.combine(*self.scores(policy, batch))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    rows = [{"prompt": f"{i} or {i + 1}?", "chosen": f"{i}" * (1 + i % 4), "rejected": "neither"} for i in range(18)]
    for name, part in (("train", rows[:13]), ("held_out", rows[13:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return {
        "model": str(save_tiny_model(folder / "model")),
        "data": {"train": [{"path": str(folder / "train.jsonl")}], "validation": [{"path": str(folder / "held_out.jsonl")}]},
        "exact_callbacks": ["jsonl"],
        "global_batch_size": 4,
        "max_tokens_per_device": 64,
        "max_steps": 4,
        "eval_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "num_threads": 1,
        "precision": "float32",
    }  # fmt: skip


def refused(settings):
    with pytest.raises(luthier.LuthierError) as caught:
        luthier.train(**settings)
    return [caught.value.code, caught.value.where, caught.value.remedy]


def test_pairs_are_not_sharded_where_each_document_is_run_alone(settings, tmp_path):
    config = transformers.FalconConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.FalconForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    given = {**settings, "model": str(tmp_path / "model"), "loss": "dpo", "adapter": "full", "exact_callbacks": []}
    spread = {**given, "distributed": {"strategy": "fsdp"}, "output_dir": str(tmp_path / "run")}
    code, where, remedy = in_ranks(2, refused, spread)[1]
    assert (code, where) == ("part-unsupported", "distributed.strategy") and "ddp" in remedy


def numbers(settings):
    """Every loss, gradient norm and held-out figure of the run, in order."""
    run = luthier.train(**settings)
    lines = [json.loads(line) for line in (run.output_path / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "eval_loss", "eval_per_token", "eval_rewards/accuracies")
    return [line[name] for line in lines for name in names if name in line]


@pytest.mark.parametrize(("loss", "adapter"), [("dpo", "full"), (Spread(), LORA)], ids=["pairs", "coupled"])
def test_two_sharded_ranks_train_and_evaluate_pairs_as_one_does(settings, tmp_path, loss, adapter):
    settings = {**settings, "loss": loss, "adapter": adapter}
    alone = numbers({**settings, "output_dir": str(tmp_path / "alone")})
    sharded = {**settings, "distributed": {"strategy": "fsdp"}, "output_dir": str(tmp_path / "sharded")}
    first, _ = in_ranks(2, numbers, sharded)
    assert len(alone) >= 10 and torch.tensor(alone).isfinite().all()
    assert first == pytest.approx(alone, rel=1e-4, abs=1e-6)
