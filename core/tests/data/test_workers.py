"""Tokenisation by several processes: what one process gives, errors included, whatever happens to a process."""

import contextlib
import os
import signal

import pytest
from luthier.data.formats.recognise_form import convert_row
from luthier.data.prepare import prepare_data
from luthier.data.read.row import Row
from luthier.data.tokenise.examples_of_rows import CHUNK, Maker
from luthier.data.tokenise.workers import (
    Workers,
    can_fork,
    count_processes,
    cut_chunks,
    forked,
    started,
    working_processes,
)
from luthier.errors import LuthierError
from luthier.recipe.schema import Data, Source

DATA = Data(train=[Source(path="rows")], unsupervised="drop", max_length=200)


def chats(count):
    def row(i):
        said = "" if i % 50 == 7 else f"{i * 7}" * (1 + i % 40)  # some unsupervised, some too long
        return {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": said}]}

    return [row(i) for i in range(count)]


@pytest.fixture(scope="module")
def maker(chat):
    return Maker.of(DATA, chat("chatml"))


@pytest.fixture(scope="module")
def forms():
    return [convert_row(Row(row, f"rows[{i}]"), "messages") for i, row in enumerate(chats(5 * CHUNK + 9))]


@pytest.fixture(scope="module")
def expected(maker, forms):
    return [maker.make(part) for part in cut_chunks(forms)]


def same(found, expected):
    assert [made.examples.fingerprint for made in found] == [made.examples.fingerprint for made in expected]
    assert [made.examples.where for made in found] == [made.examples.where for made in expected]
    assert [(m.rows, m.drops, m.changes) for m in found] == [(m.rows, m.drops, m.changes) for m in expected]
    return True


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_processes_gives_what_one_gives_in_its_order(maker, forms, expected, count):
    with Workers(maker, count, lambda others: forked(maker, others)) as workers:
        assert same(list(workers.made(cut_chunks(forms))), expected)
        assert same(
            list(workers.made(cut_chunks(forms[: CHUNK + 1]))), [expected[0], maker.make(forms[CHUNK : CHUNK + 1])]
        )


def test_a_preparation_by_two_processes_is_that_by_one(chat):
    rows = chats(3 * CHUNK)
    data = [Data(train=[Source(path="rows")], unsupervised="drop", num_proc=n, cache=False) for n in (1, 2)]
    seen = []
    one, other = (
        prepare_data(d, chat("chatml"), seed=0, given=rows, progress=lambda *now: seen.append(now)) for d in data
    )
    assert one.train.fingerprint == other.train.fingerprint
    assert one.report == other.report
    assert one.report.drops == {"unsupervised": 16}
    assert seen[:3] == seen[3:] == [(CHUNK, 3 * CHUNK), (2 * CHUNK, 3 * CHUNK), (3 * CHUNK, 3 * CHUNK)]


def test_the_bad_rows_are_the_same_whoever_meets_them_first(chat, maker, forms):
    strict = Maker.of(Data(train=[], unsupervised="error"), chat("chatml"))
    one = [made.faults for made in map(strict.make, cut_chunks(forms))]
    with Workers(strict, 3, lambda others: forked(strict, others)) as workers:
        other = [made.faults for made in workers.made(cut_chunks(forms))]
    assert other == one
    assert [fault.where for faults in one for fault in faults][:2] == ["rows[7]", "rows[57]"]
    broken = [*forms[:300], "no form", *forms[300:]]
    with (
        Workers(maker, 2, lambda others: forked(maker, others)) as workers,
        pytest.raises(RuntimeError, match="no attr"),
    ):
        list(workers.made(cut_chunks(broken)))


def killed(hand):
    os.kill(hand.process.pid, signal.SIGKILL)
    return hand


def test_the_rows_of_a_process_that_was_killed_are_done_again_and_that_is_said(maker, forms, expected, capsys):
    begun = []

    def start(others):
        begun.append(1)
        hand = forked(maker, others)
        return killed(hand) if len(begun) == 2 else hand

    with Workers(maker, 3, start) as workers:
        assert same(list(workers.made(cut_chunks(forms))), expected)
    assert len(begun) == 4
    told = capsys.readouterr().err
    assert told.count("died, its rows are done again") == 1
    assert "because='signal 9'" in told


def test_rows_that_kill_their_process_twice_are_named(maker, forms):
    with Workers(maker, 2, lambda others: killed(forked(maker, others))) as workers:
        with pytest.raises(LuthierError) as caught:
            list(workers.made(cut_chunks(forms)))
        pids = [hand.process.pid for hand in workers._hands]
    assert caught.value.code == "data-worker"
    assert "signal 9" in caught.value.problem
    ranges = [f"rows[{first}] to rows[{first + CHUNK - 1}]" for first in (0, CHUNK)]
    assert caught.value.where in ranges  # whichever of the two was killed twice first
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_no_process_outlives_its_parent(maker, forms):
    """The parent is killed in the middle; whoever holds the pipe's other end has ended when it closes."""
    reading, writing = os.pipe()
    parent = os.fork()
    if parent == 0:
        with contextlib.suppress(BaseException):
            workers = Workers(maker, 3, lambda others: forked(maker, others)).__enter__()
            next(workers.made(cut_chunks(forms)))
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == -signal.SIGKILL
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_processes_that_are_started_afresh_give_the_same(maker, forms, expected, tmp_path):
    maker.encoder.tokenizer.save_pretrained(tmp_path)
    with Workers(maker, 1, lambda others: started(str(tmp_path), DATA, others)) as workers:
        assert same(list(workers.made(cut_chunks(forms))), expected)


def test_where_another_thread_runs_processes_are_started_afresh(maker):
    import threading

    assert can_fork() == (threading.active_count() == 1)
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait)
    thread.start()
    try:
        assert not can_fork()
        with working_processes(maker, 1) as workers:
            assert isinstance(workers._hands[0].process.args, list)
    finally:
        waiting.set()
        thread.join()


def test_a_tokenizer_that_its_files_do_not_hold_is_used_by_this_process_alone(capsys):
    import threading

    from luthier.testing.worlds import tiny_tokenizer

    class Shouting(type(tiny_tokenizer())):
        pass

    tokenizer = Shouting(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="</s>")
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait)
    thread.start()
    try:
        with working_processes(Maker.of(DATA, tokenizer), 2) as workers:
            assert workers is None
    finally:
        waiting.set()
        thread.join()
    assert "one process tokenises" in capsys.readouterr().err


def test_the_number_of_processes_is_what_was_asked_for_or_what_pays(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    assert count_processes(100, None) == count_processes(1999, None) == 1
    assert count_processes(10**6, None) == min(cores, 16)
    assert count_processes(10**6, 3) == 3
    assert count_processes(CHUNK, 3) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    assert count_processes(10**6, None) == 1
