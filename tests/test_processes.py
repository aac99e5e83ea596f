"""Real processes under torchrun's own agent: restarts, several machines, and the command line with its endings."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time

import luthier
import pytest
import torch
from luthier.checkpoint import folder as checkpoint
from luthier.distributed.launch import Launch, arguments
from luthier.runs.writing.record import read_record
from luthier.testing.ranks import in_ranks
from luthier.testing.worlds import save_tiny_model
from safetensors.torch import load_file

LORA = {"name": "lora", "r": 4, "target_modules": "all-linear"}
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "TORCHELASTIC_"))}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def settings(model, tmp_path):
    def row(i):
        question = {"role": "user", "content": f"{i} and {i % 7}?" + "." * (i % 5)}
        return {"messages": [question, {"role": "assistant", "content": f"{i + i % 7}" * (1 + i % 3)}]}

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row(i)) + "\n" for i in range(24)))
    return {
        "model": str(model),
        "data": str(data),
        "adapter": LORA,
        "exact_callbacks": ["jsonl"],
        "global_batch_size": 8,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_steps": 2,
        "precision": "float32",
        "num_threads": 1,
        "memory_check": False,
        "output_dir": str(tmp_path / "run"),
    }


def adapter(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def launched(asked, work):
    """Run `work` in the processes that torchrun's agent forks from a child of this process; its exit status."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        from torch.distributed.launcher.api import elastic_launch
        from torch.distributed.run import config_from_args, get_args_parser

        os.environ["OMP_NUM_THREADS"] = "1"
        config, *_ = config_from_args(get_args_parser().parse_args([*arguments(asked, {}), "script.py"]))
        config.start_method = "fork"
        elastic_launch(config=config, entrypoint=work)()
        status = 0
    finally:
        os._exit(status)


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Dying:
    """Rank 1 is killed after a step, in the first start alone."""

    every_rank = True

    def __init__(self, step):
        self.step = step

    @luthier.event
    def step_ended(self, run, step):
        if step == self.step and not run.is_main and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)


def losses(settings):
    return luthier.train(**settings).loss_history


def test_a_killed_process_begins_again_with_the_others_and_ends_at_the_same_weights(settings, tmp_path):
    straight = in_ranks(2, losses, {**settings, "output_dir": str(tmp_path / "straight")})
    dying = {**settings, "exact_callbacks": ["jsonl", Dying(5)]}
    assert status_of(launched(Launch(nproc_per_node="2", max_restarts=1), lambda: losses(dying))) == 0
    record = read_record(tmp_path / "run")
    assert (record["state"], record["restarts"], record["world_size"]) == ("completed", 1, 2)
    assert "error" not in record
    assert record["result"]["loss_history"] == straight[0]
    assert_equal(adapter(tmp_path / "run"), adapter(tmp_path / "straight"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_its_last_checkpoint_and_the_same_call_goes_on(settings, tmp_path):
    dying = {**settings, "exact_callbacks": ["jsonl", Dying(5)]}
    assert status_of(launched(Launch(nproc_per_node="2"), lambda: losses(dying))) == 1
    record = read_record(tmp_path / "run")
    assert record["state"] == "failed"
    assert re.search(r"another process of the run is gone: .*\[distributed-lost\]", record["error"])
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run")] == ["step-00000002", "step-00000004"]
    assert checkpoint.newest_checkpoint(tmp_path / "run")[2] == []
    in_ranks(2, losses, settings)
    assert read_record(tmp_path / "run")["state"] == "completed"


@pytest.mark.parametrize("by_hand", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_machines_meet_by_the_usual_flags(settings, tmp_path, by_hand):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    straight = in_ranks(2, losses, {**settings, "output_dir": str(tmp_path / "straight")})

    def asked(node):
        if by_hand:
            return Launch(nnodes="2", node_rank=node, master_addr="localhost", master_port=port)
        return Launch(nnodes="2", rdzv_endpoint=f"localhost:{port}", rdzv_id="ours")

    children = [launched(asked(node), lambda: losses(settings)) for node in range(2)]
    assert [status_of(child) for child in children] == [0, 0]
    assert read_record(tmp_path / "run")["result"]["loss_history"] == straight[0]


def words(settings, **changes):
    """The settings as flags."""
    flat = {"adapter": "lora", "adapter.r": 4, "adapter.target_modules": "all-linear", "exact_callbacks": "[jsonl]"}
    named = {**settings, **flat, **changes}
    return [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def command(*parts, **more):
    return subprocess.Popen([sys.executable, *parts], env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **more)  # fmt: skip


def test_the_command_starts_its_processes_and_tells_one_answer(settings, tmp_path):
    process = command("-m", "luthier", "train", *words(settings), "--nproc-per-node", "2", "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    answer = json.loads(out)
    assert answer["steps"] == 6
    assert read_record(tmp_path / "run")["world_size"] == 2
    assert err.count("run started") == 1
    expected = in_ranks(2, losses, {**settings, "output_dir": str(tmp_path / "forked")})
    assert answer["loss_history"] == expected[0]


@pytest.mark.slow
def test_torchruns_own_command_does_as_well(settings, tmp_path):
    process = command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "luthier", "train",
                      *words(settings), "--json")  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["steps"] == 6
    assert read_record(tmp_path / "run")["world_size"] == 2


@pytest.mark.slow
def test_an_error_that_every_process_meets_is_told_once(settings, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": 3}\n')
    for start in (["luthier"], ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "luthier"]):
        more = ["--nproc-per-node", "2"] if start == ["luthier"] else []
        process = command("-m", *start, "train", *words(settings), *more)
        _, err = process.communicate(timeout=300)
        assert err.count("error: ") == 1, err
        assert "rows.jsonl" in err
    assert not (tmp_path / "run").exists()


def children_of(pid):
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "luthier train" in line]


def until(happened, process, seconds=240):
    """Wait for what a process does that must not end before."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            pytest.fail(f"ended with {process.returncode}: {process.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to", "status", "state"),
    [
        (signal.SIGTERM, "launcher", 143, "stopped"),
        (signal.SIGINT, "launcher", 130, "stopped"),
        (signal.SIGTERM, "worker", 143, "stopped"),
        (signal.SIGKILL, "worker", 1, "failed"),
        (signal.SIGKILL, "launcher", -9, "stopped"),
    ],
)
def test_however_it_ends_it_has_saved_and_leaves_no_process(settings, tmp_path, number, to, status, state):
    given = words(settings, max_steps=100000, save_steps=5)
    process = command("-m", "luthier", "train", *given, "--nproc-per-node", "2")
    until(lambda: checkpoint.list_checkpoints(tmp_path / "run"), process)
    workers = children_of(process.pid)
    ends = [os.pidfd_open(worker) for worker in workers]
    assert len(workers) == 2
    os.kill(process.pid if to == "launcher" else workers[-1], number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == status
    for end in ends:
        assert select.select([end], [], [], 60)[0], "a process was left behind"
        os.close(end)
    assert read_record(tmp_path / "run")["state"] == state
    assert checkpoint.newest_checkpoint(tmp_path / "run")[2] == []
    if status > 0:
        assert err.count("error: ") == 1, err
        assert ("the same command goes on" if state == "stopped" else "was ended by SIGKILL") in err


@pytest.mark.slow
def test_a_save_is_asked_of_the_launcher_as_of_the_run(settings, tmp_path):
    given = words(settings, max_steps=100000, save_steps=100000)
    process = command("-m", "luthier", "train", *given, "--nproc-per-node", "2")
    until((tmp_path / "run/metrics.jsonl").exists, process)
    os.kill(process.pid, signal.SIGUSR1)
    until(lambda: checkpoint.list_checkpoints(tmp_path / "run"), process)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 143


@pytest.mark.slow
def test_a_fresh_run_that_begins_again_goes_on_in_its_own_folder(settings, tmp_path):
    in_ranks(2, losses, settings)
    dying = {**settings, "fresh": True, "exact_callbacks": ["jsonl", Dying(5)]}
    assert status_of(launched(Launch(nproc_per_node="2", max_restarts=1), lambda: losses(dying))) == 0
    assert read_record(tmp_path / "run-2")["restarts"] == 1
    assert read_record(tmp_path / "run-2")["state"] == "completed"
    assert not (tmp_path / "run-3").exists()
