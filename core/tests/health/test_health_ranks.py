"""Health with two processes: the same decision, the same finding, the same weights as one process alone."""

import json
import math

import luthier
import pytest
import torch
from luthier.errors import LuthierError
from luthier.plugins.contracts.values import LossOutput
from luthier.runs.writing.record import read_record
from luthier.testing.ranks import in_ranks


class Failing:
    """The usual loss, NaN for one row, which only one rank meets."""

    data = "tokens"

    def __init__(self, text):
        self.text = text

    def terms(self, batch):
        return {"tokens": float(len(batch.supervised))}

    def __call__(self, policy, batch):
        factor = math.nan if self.text in batch.where else 1.0
        return LossOutput(sums={"tokens": -policy.token_logprobs(batch).sum() * factor})


@pytest.fixture
def settings(tmp_path, rows, model_folder):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"name_or_path": str(model_folder), "dtype": "float64"},
        "data": str(data),
        "loss": Failing(f"{data}:7"),
        "optimizer": "sgd",
        "global_batch_size": 6,
        "packing": False,
        "exact_callbacks": ["jsonl"],
        "device": "cpu",
    }


def trained(settings, folder):
    run = luthier.train(**settings, output_dir=folder)
    weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    return {"losses": torch.tensor(run.loss_history, dtype=torch.float64), "weights": weights}


def refused(settings, folder):
    try:
        luthier.train(**settings, output_dir=folder)
    except LuthierError as error:
        return {"code": error.code, "problem": error.problem, "where": error.where}
    raise AssertionError("it trained")


def test_every_rank_skips_the_step_that_one_of_them_cannot_use(settings, tmp_path):
    settings["on_nonfinite"] = "skip"
    alone = trained(settings, tmp_path / "alone")
    one, two = in_ranks(2, trained, settings, tmp_path / "two")
    assert torch.equal(one["losses"].isnan(), alone["losses"].isnan())
    assert alone["losses"].isnan().sum() == 1
    for rank in (one, two):
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-10, atol=0, equal_nan=True)
    assert read_record(tmp_path / "two")["health"]["skipped_steps"] == 1


def test_every_rank_stops_with_the_finding_of_the_one_that_has_it(settings, tmp_path):
    told = in_ranks(2, refused, settings, tmp_path / "two")
    assert told[0] == told[1]
    assert told[0]["code"] == "train-nonfinite"
    assert told[0]["where"].endswith("rows.jsonl:7")
    assert " of rank " in told[0]["problem"]
