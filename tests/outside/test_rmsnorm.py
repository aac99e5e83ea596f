"""An outsider's operation: listed, planned, used and logged once it is installed, and removed by `kernels: reference`."""

import json
import os
import shutil
import signal
import textwrap
from pathlib import Path

import luthier
import pytest
from luthier import LuthierError
from luthier.plugins.registry import installed_plugins
from luthier.runs.writing.active_run import Interrupted

NAME = "outside.rms_norm"
SHORT = {"max_steps": 3, "num_threads": 1}
LONG = {"max_steps": 5, "num_threads": 1}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No other operation is installed."""
    monkeypatch.setenv("LUTHIER_DISABLE_PLUGINS", "kernels")
    installed_plugins.cache_clear()
    yield
    installed_plugins.cache_clear()


@pytest.fixture
def norm(install_outside):
    """The installed package's module, with nothing counted yet."""
    install_outside("rmsnorm")
    from luthier_outside_rmsnorm import norm

    norm.CALLS.clear()
    return norm


@pytest.fixture
def install_spoiled(install_outside, outside_folder, tmp_path):
    """`install_spoiled(lines)`: the package whose norm ends with these lines; `own` is the norm before them."""

    def install(lines):
        folder = Path(shutil.copytree(outside_folder("rmsnorm"), tmp_path / "spoiled"))
        with (folder / "luthier_outside_rmsnorm/norm.py").open("a") as file:
            file.write(f"own = rms_norm\n{textwrap.dedent(lines)}")
        install_outside(folder)

    return install


WRONG = """
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, result):
            return result * FACTOR

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    def rms_norm(*given):
        return Wrong.apply(own(*given))
"""
FAILING = """
    def rms_norm(*given):
        if CALLS["backward"] > 8:
            CALLS["failed"] += 1
            raise RuntimeError("no such kernel")
        return own(*given)
"""
BROKEN = """
    def rms_norm(*given):
        return 1 / 0
"""


def events(folder, name):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def record(folder):
    return json.loads((folder / "run.json").read_text())


def test_it_is_listed_with_its_distribution(norm, run_luthier):
    rows = run_luthier("plugins", "--json").document["plugins"]
    assert ("operation", NAME, "luthier-outside-rmsnorm", "ok") in [
        (row["kind"], row["name"], row["distribution"], row["state"]) for row in rows
    ]


def test_it_is_not_there_where_it_is_not_installed(train, tmp_path):
    train(**SHORT)
    assert record(tmp_path / "run")["decisions"]["kernels"] == {"value": [], "reason": "none is installed"}


def test_it_computes_the_norms_of_a_run_without_being_named_and_is_logged(norm, train, tmp_path):
    train(**SHORT)
    assert norm.CALLS["forward"] > 0
    assert norm.CALLS["backward"] > 0
    (ran,) = [line for line in events(tmp_path / "run", "operation") if line["name"] == "rms_norm"]
    assert (ran["implementation"], ran["owner"]) == (NAME, "luthier-outside-rmsnorm 0.1.0")
    assert record(tmp_path / "run")["decisions"]["kernels"]["value"] == [
        f"rms_norm: {NAME} (luthier-outside-rmsnorm 0.1.0)"
    ]


def test_kernels_reference_leaves_it_out(norm, train, tmp_path):
    train(**SHORT, kernels="reference")
    assert not norm.CALLS
    ran = {line["name"]: line["implementation"] for line in events(tmp_path / "run", "operation")}
    assert set(ran.values()) == {"reference"}
    assert record(tmp_path / "run")["decisions"]["torch_compile"]["value"] is False


def test_the_loss_is_that_of_the_reference(norm, train, tmp_path):
    mine = train(**SHORT, kernels="require", output_dir=tmp_path / "mine")
    theirs = train(**SHORT, kernels="reference", output_dir=tmp_path / "theirs")
    assert mine.loss_history == pytest.approx(theirs.loss_history, rel=1e-5)


def test_a_plan_says_where_it_would_run_and_does_not_call_it(norm, model_folder, data_file):
    found = luthier.plan(model=str(model_folder), data=str(data_file), adapter="lora")
    assert f"rms_norm: {NAME}" in found.operations
    assert found.decisions["kernels"]["value"] == [f"rms_norm: {NAME} (luthier-outside-rmsnorm 0.1.0)"]
    assert not norm.CALLS


def test_the_plan_on_the_command_line_shows_it(norm, run_luthier, model_folder, data_file):
    words = ["plan", "--model", model_folder, "--data", data_file, "--adapter", "lora"]
    assert f"rms_norm: {NAME}" in run_luthier(*words, "--json").document["operations"]
    lines = [line.split() for line in run_luthier(*words).stdout.splitlines()]
    assert ["rms_norm", NAME] in lines


def terminated(train):
    """A run that is sent SIGTERM after its second step."""

    def end(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(**LONG, exact_callbacks=["jsonl", luthier.on(step_ended=end)])


def test_a_run_that_began_without_it_goes_on_without_it(train, tmp_path, install_outside):
    straight = train(**LONG, output_dir=tmp_path / "straight")
    terminated(train)
    install_outside("rmsnorm")
    from luthier_outside_rmsnorm import norm

    again = train(**LONG)
    assert not norm.CALLS
    assert again.loss_history == straight.loss_history


def test_a_run_that_began_with_it_goes_on_with_it_bit_for_bit(norm, train, tmp_path):
    straight = train(**LONG, output_dir=tmp_path / "straight")
    terminated(train)
    norm.CALLS.clear()
    again = train(**LONG)
    assert norm.CALLS["backward"] > 0
    assert again.loss_history == straight.loss_history


def test_a_run_that_began_with_it_says_aloud_that_it_is_gone(norm, train, tmp_path, monkeypatch, capsys):
    terminated(train)
    monkeypatch.setenv("LUTHIER_DISABLE_PLUGINS", "outside_rmsnorm,kernels")
    installed_plugins.cache_clear()
    norm.CALLS.clear()
    train(**LONG)
    assert not norm.CALLS
    assert record(tmp_path / "run")["decisions"]["kernels"]["value"] == []
    assert "decided anew" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["value", "gradient"])
def test_other_numbers_are_an_error_before_the_first_step(install_spoiled, train, tmp_path, what):
    install_spoiled(WRONG.replace("FACTOR", "1.001" if what == "value" else "1.0"))
    with pytest.raises(LuthierError) as caught:
        train(**SHORT)
    assert caught.value.code == "operation-differs"
    assert NAME in caught.value.where
    assert ("result" if what == "value" else "gradient") in caught.value.problem
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_one_that_raises_falls_back_once_aloud_and_stays_out_on_resume(install_spoiled, train, tmp_path):
    install_spoiled(FAILING)
    train(**SHORT)
    (fell,) = events(tmp_path / "run", "operation fell back")
    assert (fell["implementation"], fell["reason"], fell["level"]) == (NAME, "RuntimeError: no such kernel", "warning")
    from luthier_outside_rmsnorm.norm import CALLS

    assert CALLS["failed"] == 1
    assert record(tmp_path / "run")["decisions"]["kernels_dropped"]["value"] == [NAME]


def test_one_that_raises_is_an_error_where_it_is_required(install_spoiled, train):
    install_spoiled(BROKEN)
    with pytest.raises(LuthierError) as caught:
        train(**SHORT, kernels="require")
    assert caught.value.code == "operation-failed"
    assert "ZeroDivisionError" in str(caught.value)


def test_require_asks_for_an_operation_that_is_installed(train):
    with pytest.raises(LuthierError) as caught:
        train(**SHORT, kernels="require")
    assert (caught.value.code, caught.value.where) == ("operation-failed", "kernels")
