"""The audit of a finished checkpoint."""

import json
import shutil

import luthier
import pytest
import torch
from luthier.testing import expect_error
from luthier_osft import Osft
from luthier_osft.__main__ import main
from luthier_osft.audit import LATER, PERHAPS_LATER, audit_model, audit_weight
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def run(model_folder, rows_of, tmp_path_factory):
    return luthier.train(
        model=str(model_folder), data=rows_of("one"), adapter=Osft(), merge=True, exact_callbacks=[], max_steps=4,
        learning_rate=1e-2, memory_check=False, output_dir=tmp_path_factory.mktemp("audit"), global_batch_size=4,
    )  # fmt: skip


def test_a_run_of_ours_keeps_its_directions(run, model_folder, capsys):
    assert main(["audit", str(model_folder), str(run.output_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["layers"]) == 14 and told["unprotected"] == []
    assert all(layer["change"] > 1e-3 for layer in told["layers"])
    assert all(max(layer["left"], layer["right"]) < 1e-5 for layer in told["layers"])
    assert main(["audit", str(model_folder), str(run.merged), "--unfreeze-rank-ratio", "0.25"]) == 0
    assert "14 weights: all keep their directions" in capsys.readouterr().out


def test_full_tuning_is_caught(train, model_folder, capsys):
    full = train(adapter="full")
    assert main(["audit", str(model_folder), str(full.artifact), "--unfreeze-rank-ratio", "0.25"]) == 1
    printed = capsys.readouterr().out
    assert "14 have moved" in printed and "model.norm.weight" in printed


def test_a_larger_share_than_was_preserved_is_caught(run, model_folder):
    assert main(["audit", str(model_folder), str(run.merged), "--unfreeze-rank-ratio", "0.1"]) == 1


def test_rounding_to_bfloat16_is_told_from_a_move(run, tmp_path, model_folder):
    copied = shutil.copytree(run.merged, tmp_path / "low")
    tensors = {n: t.to(torch.bfloat16) for n, t in load_file(copied / "model.safetensors").items()}
    save_file(tensors, copied / "model.safetensors")
    assert main(["audit", str(model_folder), str(copied), "--unfreeze-rank-ratio", "0.25"]) == 0


def test_the_shares_are_those_of_the_first_directions():
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    change = torch.zeros(4, 4)
    change[0, 3], change[3, 3], change[3, 1] = 3.0, 4.0, 12.0
    found = audit_weight("w", weight, weight + change, 2)
    assert (found.left, found.right) == pytest.approx((3 / 13, 12 / 13))


@pytest.mark.parametrize("case", ["same", "no ratio", "no folder"])
def test_what_cannot_be_audited_is_said(case, model_folder, tmp_path, capsys):
    arguments = {
        "same": [str(model_folder), str(model_folder), "--unfreeze-rank-ratio", "0.5"],
        "no ratio": [str(model_folder), str(model_folder)],
        "no folder": [str(model_folder), str(tmp_path), "--unfreeze-rank-ratio", "0.5"],
    }[case]
    assert main(["audit", *arguments]) == 2
    word = {"same": "no tensor differs", "no ratio": "--unfreeze-rank-ratio", "no folder": "no model.safetensors"}[case]
    assert word in capsys.readouterr().err


@pytest.fixture(scope="module")
def sequence(model_folder, rows_of, tmp_path_factory):
    """Two tasks; the first moves its free directions so far that some are among the largest afterwards."""
    tasks = [{"name": name, "data": rows_of(name)} for name in ("one", "two")]
    return luthier.continual(
        model=str(model_folder), tasks=tasks, data={"validation": 0.25}, adapter={"name": "osft"}, merge=True,
        exact_callbacks=[], max_steps=6, learning_rate=0.1, memory_check=False, global_batch_size=4, eval_base=False,
        output_dir=tmp_path_factory.mktemp("sequence") / "out",
    )  # fmt: skip


def test_each_task_keeps_the_directions_of_the_one_before_and_the_first_base_is_answered(
    sequence, model_folder, capsys
):
    first, second = map(str, sequence.runs)
    assert main(["audit", str(model_folder), first]) == 0
    assert main(["audit", first, second]) == 0
    capsys.readouterr()
    assert main(["audit", str(model_folder), second]) == 1
    assert LATER in capsys.readouterr().out
    assert main(["audit", str(model_folder), second, "--unfreeze-rank-ratio", "0.25", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["later_task"] is False
    assert main(["audit", str(model_folder), second, "--unfreeze-rank-ratio", "0.25"]) == 1
    assert PERHAPS_LATER in capsys.readouterr().out


def test_the_embedded_model_is_a_base_by_its_name(run, capsys):
    assert main(["audit", "demo", str(run.output_path)]) == 2  # another model's: its layers have other shapes
    told = capsys.readouterr().err
    assert "no model.safetensors" not in told and "artifact-mismatch" in told


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_a_folder_that_does_not_exist_is_said_to_be_missing(model_folder, tmp_path, ratio):
    with expect_error("artifact-not-found", str(tmp_path / "none")):
        audit_model(model_folder, tmp_path / "none", ratio)
