"""Turns of requests: one rate for each service, over all clients, jobs and processes of a folder."""

import asyncio
import multiprocessing
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier import ServiceClient
from luthier.jobs.transport.request_turns import LONGEST, RequestTurns, use_turns
from luthier.testing import expect_error
from luthier.testing.loopback import Fault, LoopbackServer, Reply

GAP = 0.1  # seconds


@given(waits=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=30))
def test_turns_are_at_least_a_gap_apart_whenever_they_are_asked_for(waits):
    turns, now, begins = RequestTurns(), 1e9, []
    for wait in waits:
        now += wait
        begins.append(now + turns.reserve_turn("service", now, GAP))
    assert all(later - earlier > GAP - 1e-6 for earlier, later in zip(begins, begins[1:], strict=False))


def reserve_many(folder, count, answers):
    turns = RequestTurns(folder)
    answers.put([turns.reserve_turn("service", 1e9, GAP) for _ in range(count)])


def test_two_processes_share_the_turns_of_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=reserve_many, args=(tmp_path, 30, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    begins = sorted(sum((answers.get(timeout=60) for _ in processes), []))
    for process in processes:
        process.join()
    assert begins == pytest.approx([GAP * number for number in range(60)], abs=1e-5)


def test_services_do_not_wait_for_each_other(tmp_path):
    turns = RequestTurns(tmp_path)
    assert [turns.reserve_turn(name, 1e9, GAP) for name in ("one", "two", "one")] == pytest.approx([0, 0, GAP])


def test_a_turn_that_a_clock_wrote_which_was_set_back_since_holds_nobody_up(tmp_path):
    RequestTurns(tmp_path).reserve_turn("service", 1e9 + 2 * LONGEST, GAP)
    assert RequestTurns(tmp_path).reserve_turn("service", 1e9, GAP) == 0


def test_a_damaged_file_is_told_by_its_path(tmp_path):
    (tmp_path / "turns.sqlite").write_bytes(b"no database" * 100)
    with expect_error("job-store-damaged", str(tmp_path / "turns.sqlite")):
        RequestTurns(tmp_path).reserve_turn("service", 1e9, GAP)


def ask_beside_each_other(server, clock, turns, count, rate):
    async def ask_once():
        with use_turns(turns):
            client = ServiceClient(server.url, service="service", clock=clock, rate=rate)
        try:
            return await client.read_json("/x")
        finally:
            await client.close()

    async def ask_all():
        return await asyncio.gather(*(ask_once() for _ in range(count)))

    return asyncio.run(ask_all())


def test_clients_beside_each_other_keep_to_one_rate(clock, tmp_path):
    server, began = LoopbackServer(lambda request: Reply(body={})), clock.now()
    with server.running():
        ask_beside_each_other(server, clock, RequestTurns(tmp_path), 12, rate=4.0)
    assert len(server.requests) == 12
    assert clock.now() - began >= 11 / 4.0 - 1e-6


def test_who_is_asked_to_wait_holds_the_others_back_too(clock, tmp_path):
    server, turns = LoopbackServer(lambda request: Reply(body={})), RequestTurns(tmp_path)
    server.faults = [Fault(kind="answer", reply=Reply(status=429, body={}, headers={"retry-after": "40"}))]
    with server.running():
        ask_beside_each_other(server, clock, turns, 1, rate=1e6)
    assert max(clock.slept) >= 40
    assert Counter(request.path for request in server.requests) == {"/x": 2}
    other = RequestTurns(tmp_path)
    assert other.reserve_turn(server.url, clock.now() - 30, GAP) >= 30 - 1e-6


def test_fifty_jobs_that_are_polled_at_once_keep_to_the_rate_of_their_service(clock, manager, rows, service):
    server = LoopbackServer(lambda request: Reply(body={}))

    class Asking(type(service)):
        async def status(self, remote_id):
            client = ServiceClient(server.url, service="service", rate=10.0)
            try:
                await client.read_json("/status")
            finally:
                await client.close()
            return await super().status(remote_id)

    with server.running():
        provider = Asking(service.path)
        ids = [manager.submit_sync({"model": "demo", "data": str(rows)}, provider=provider).id for _ in range(5)]
        began, before = clock.now(), len(server.requests)

        async def poll():
            await asyncio.gather(*(manager.status(id) for id in ids * 10))

        asyncio.run(poll())
        asked = len(server.requests) - before
    assert asked == 50
    assert clock.now() - began >= 49 / 10.0 - 1e-6
