"""How runs end badly: what a newer luthier wrote is left alone, and a callback's own failure hides nothing."""

import json

import luthier
import pytest
from luthier import event
from luthier.recipe.artifact_note import NOTE, find_artifact, read_note
from luthier.runs.writing.record import read_record
from luthier.step.opened import open_artifact
from luthier.testing import expect_error


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_with_a_checkpoint_of_a_newer_luthier_is_refused_and_nothing_of_it_is_touched(train, tmp_path):
    with pytest.raises(ZeroDivisionError):
        train(save_steps=1, max_steps=4, exact_callbacks=[luthier.on(step_ended=lambda step: 1 / (step - 3))])
    manifest = tmp_path / "run/checkpoints/step-00000002/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99, "luthier": "12.0"}))
    before = contents(tmp_path / "run")
    with expect_error("format-newer", "step-00000002", "12.0") as caught:
        train(save_steps=1, max_steps=4, exact_callbacks=[])
    assert caught.value.code == "format-newer" and str(manifest.parent) == caught.value.where
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_failed_hides_neither_the_runs_own_nor_another_callback(kind, train, tmp_path):
    heard = []

    class Failing:
        @event
        def step_ended(self):
            raise ZeroDivisionError("the run's own")

        @event
        def failed(self, error):
            heard.append(error)
            raise kind("of the hook")

    with pytest.raises(ZeroDivisionError, match="the run's own") as caught:
        train(exact_callbacks=[Failing(), Failing()], max_steps=1)
    assert heard == [caught.value] * 2 and "of the hook" in " ".join(caught.value.__notes__)
    assert "the run's own" in read_record(tmp_path / "run")["error"]


@pytest.mark.parametrize("read", [open_artifact, read_note])
def test_an_artifact_of_a_newer_luthier_says_which_is_wanted(read, train, tmp_path):
    folder = find_artifact(str(train(max_steps=1).output_path))
    note = json.loads((folder / NOTE).read_text())
    assert note["luthier"]
    (folder / NOTE).write_text(json.dumps({**note, "format": note["format"] + 1, "luthier": "3.1"}))
    with expect_error("format-newer", "luthier.json", "3.1"):
        read(folder)
