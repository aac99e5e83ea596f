"""Launching: torchrun's words from flags and environment, and what processes leave for the one that started them."""

import json
import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier.cli.screen.launch_ranks import without
from luthier.distributed import outcome
from luthier.distributed.launch import Launch, arguments, launch_flags
from luthier.distributed.world import error_attributes, is_lost, lost
from luthier.errors import LuthierError
from luthier.testing import expect_error


def told(asked, environ=()):
    return dict(word.removeprefix("--").split("=", 1) for word in arguments(asked, dict(environ)))


def test_a_flag_wins_over_the_environment_and_that_over_the_default():
    environ = {"PET_NPROC_PER_NODE": "4", "PET_MAX_RESTARTS": "2", "PET_RDZV_ID": "theirs"}
    words = told(Launch(nproc_per_node="2"), environ)
    assert words["nproc-per-node"] == "2"
    assert (words["max-restarts"], words["rdzv-id"]) == ("2", "theirs")
    assert "nnodes" not in words


def test_one_machine_meets_itself_at_a_free_port_under_a_name_of_its_own():
    one, other = told(Launch(nproc_per_node="2")), told(Launch(nproc_per_node="2"))
    assert one["rdzv-endpoint"] == "localhost:0"
    assert one["rdzv-backend"] == "c10d"
    assert one["rdzv-id"] != other["rdzv-id"]


@pytest.mark.parametrize(
    ("asked", "backend"),
    [
        ({"rdzv_endpoint": "head:29400"}, "c10d"),
        ({"rdzv_endpoint": "head:29400", "node_rank": 0}, "static"),
        ({"master_addr": "head", "node_rank": 1}, "static"),
    ],
)
def test_machines_are_numbered_by_hand_or_as_they_come(asked, backend):
    assert told(Launch(nnodes="2", **asked))["rdzv-backend"] == backend
    assert "rdzv-endpoint" not in told(Launch(nnodes="2", master_addr="head", node_rank=1))


def test_the_environments_own_rendezvous_is_kept():
    environ = {"PET_RDZV_BACKEND": "etcd-v2", "PET_RDZV_ENDPOINT": "keys:2379", "PET_NNODES": "2", "PET_NODE_RANK": "1"}
    assert told(Launch(), environ)["rdzv-backend"] == "etcd-v2"


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"nnodes": "2"}, ("launch", "2")),
        ({"nnodes": "2", "master_addr": "head"}, ("launch",)),
        ({"rdzv_endpoint": "head:1", "master_addr": "head"}, ("twice",)),
    ],
)
def test_what_could_not_meet_is_refused(asked, problem):
    with pytest.raises(LuthierError) as caught:
        arguments(Launch(**asked), {})
    assert all(fact in str(caught.value) for fact in problem)
    assert (caught.value.code, caught.value.where) == ("distributed-setup", "launch")


def test_processes_are_started_where_they_are_asked_for_and_only_once():
    assert not Launch().wanted({})
    assert Launch(nproc_per_node="1").wanted({})
    assert Launch(max_restarts=3).wanted({})
    assert Launch().wanted({"PET_NPROC_PER_NODE": "2"})
    assert not Launch().wanted({"PET_NPROC_PER_NODE": "2", "TORCHELASTIC_RUN_ID": "x"})
    assert not Launch().wanted({"WORLD_SIZE": "2", "RANK": "0"})
    with expect_error("distributed-setup", "launch"):
        Launch(nproc_per_node="2").wanted({"TORCHELASTIC_RUN_ID": "x"})


WORDS = st.lists(st.sampled_from(["train", "r.yaml", "--adapter.r", "8", "--json", "--set", "a=b", "-x"]), max_size=6)
OURS = st.sampled_from([["--nproc-per-node", "2"], ["--nnodes=3"], ["--rdzv-id", "--odd"], ["--max-restarts=0"]])


@given(WORDS, OURS, WORDS)
def test_the_command_is_passed_on_without_these_flags(before, ours, after):
    assert without([*before, *ours, *after], launch_flags()) == [*before, *after]


def test_the_first_error_that_is_a_processs_own_is_told(tmp_path):
    outcome.leave_outcome(tmp_path, 0, "error", error_attributes(lost(RuntimeError("Connection closed by peer"))))
    outcome.leave_outcome(
        tmp_path, 1, "error", error_attributes(LuthierError("data-row", "is broken", where="rows.jsonl:3"))
    )
    error = outcome.find_failure(tmp_path, {0: 1, 1: 2})
    assert (error.code, error.where) == ("data-row", "rows.jsonl:3")


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ({0: 1, 1: -signal.SIGKILL}, ("process 1", "SIGKILL")),
        ({1: -signal.SIGTERM, 0: -signal.SIGSEGV}, ("process 0", "SIGSEGV")),
        ({1: 3, 0: -signal.SIGTERM}, ("process 1", "status 3")),
    ],
)
def test_who_was_killed_is_named(tmp_path, ends, told):
    outcome.leave_outcome(tmp_path, 0, "error", error_attributes(lost(RuntimeError("Connection closed by peer"))))
    error = outcome.find_failure(tmp_path, ends)
    assert error.code == "distributed-lost"
    assert all(fact in str(error) for fact in told)
    assert "--max-restarts" in str(error)


def test_an_answer_is_rank_0s_and_a_stop_is_everyones(tmp_path):
    outcome.leave_outcome(tmp_path, 1, "answer", {"of": 1})
    assert outcome.read_outcome(tmp_path) == {}
    outcome.leave_outcome(tmp_path, 0, "answer", {"of": 0})
    assert outcome.read_outcome(tmp_path) == {"of": 0}
    outcome.leave_outcome(tmp_path, 0, "stopped", {"status": 130, "told": "stopped by SIGINT after step 3"})
    with pytest.raises(outcome.Stopped, match="after step 3") as caught:
        outcome.read_outcome(tmp_path)
    assert caught.value.exit_status == 130


def test_a_start_forgets_how_the_one_before_it_ended(tmp_path):
    outcome.leave_outcome(tmp_path, 0, "error", {"code": "data-row"})
    outcome.leave_outcome(tmp_path, 1, "error", {"code": "data-row"})
    outcome.announce_rank(tmp_path, 0)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["error-1.json", "pid-0"]


def test_a_signal_is_handed_on_to_whoever_has_arrived(tmp_path):
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        outcome.announce_rank(tmp_path, 0)
        (tmp_path / "pid-1").write_text("999999999")
        outcome.forward_signal(tmp_path, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
    assert json.loads((tmp_path / "pid-0").read_text()) == os.getpid()


def test_what_gloo_says_of_a_lost_peer_is_told_in_few_words():
    text = "[/pytorch/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:49894: Connection reset by peer. This is typically caused by a worker. GLHF!"
    assert is_lost(RuntimeError(text))
    assert not is_lost(RuntimeError("shape mismatch"))
    problem = "another process of the run is gone: Read error [127.0.0.1]:49894: Connection reset by peer"
    assert lost(RuntimeError(text)).problem == problem
