"""What a service answers, value by value and page by page, and the names that it gives its files."""

import asyncio
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier import (
    LuthierError,
    ProviderError,
    ServiceClient,
    drop_missing,
    elapsed_seconds,
    place_inside,
    read_number,
    read_pages,
    read_time,
)
from luthier.jobs.transport.answer_errors import Answer, read_refusal
from luthier.jobs.wire.wire_answers import read_wire_job
from luthier.testing.loopback import LoopbackServer, Reply

MOMENTS = st.datetimes(datetime(1971, 1, 1), datetime(2090, 1, 1), timezones=st.just(UTC))


@given(st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False)))
def test_a_number_is_read_as_itself_and_as_a_text(value):
    assert read_number(value) == read_number(str(value)) == float(value)


@pytest.mark.parametrize("value", [None, "", "x", [], {}, True, math.nan, "inf", -math.inf])
def test_what_is_no_finite_number_is_none(value):
    assert read_number(value) is None


@given(MOMENTS, st.integers(-720, 720))
def test_a_moment_is_read_from_its_date_in_any_zone_and_from_its_seconds(moment, minutes):
    from datetime import timezone

    elsewhere = moment.astimezone(timezone(timedelta(minutes=minutes)))
    seconds = moment.timestamp()
    assert read_time(elsewhere.isoformat()) == read_time(seconds) == seconds
    assert read_time(moment.isoformat().replace("+00:00", "Z")) == seconds


def test_what_is_no_moment_is_none_and_time_never_runs_back():
    assert [read_time(v) for v in (None, "", "yesterday", [])] == [None] * 4
    assert read_time("2026-11-28T07:00:00.123456789Z") == read_time("2026-11-28T07:00:00.123456Z")
    assert (elapsed_seconds(1.0, 3.0), elapsed_seconds(3.0, 1.0), elapsed_seconds(None, 1.0)) == (2.0, 0.0, None)
    assert drop_missing(a=0, b=None, c=False) == {"a": 0, "c": False}


@given(st.lists(st.text("abc.", min_size=1).filter(lambda part: part not in (".", "..")), min_size=1, max_size=4))
def test_a_files_place_is_inside_the_folder_and_ends_with_its_name(parts):
    folder = Path("/runs/x")
    place = place_inside(folder, "/".join(parts))
    assert place.is_relative_to(folder) and place.name == parts[-1]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..\\x", "", "a/.."])
def test_a_name_that_leaves_the_folder_is_refused(name):
    with pytest.raises(LuthierError) as caught:
        place_inside(Path("/runs/x"), name)
    assert caught.value.code == "archive-unsafe"


def read_list(clock, answer):
    """(items, requests) of a list that a server gives."""
    server = LoopbackServer(answer)

    async def inside():
        client = ServiceClient(server.url, service="service", clock=clock, rate=1e6)
        try:
            return [item async for item in read_pages(client, "/jobs", "jobs", params={"size": 2})]
        finally:
            await client.close()

    with server.running():
        return asyncio.run(inside()), server.requests


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_every_item_of_every_page_is_given_once(clock, count):
    def answer(request):
        begin = int(request.first("pageToken") or 0)
        more = {"nextPageToken": str(begin + 2)} if begin + 2 < count else {}
        return Reply(body={"jobs": [{"n": n} for n in range(begin, min(begin + 2, count))], **more})

    items, requests = read_list(clock, answer)
    assert [item["n"] for item in items] == list(range(count))
    assert all(request.first("size") == "2" for request in requests)


@pytest.mark.parametrize("token", [lambda n: "same", str])
def test_a_list_that_does_not_end_is_cut_off(clock, token):
    seen = []

    def answer(request):
        seen.append(request)
        return Reply(body={"jobs": [{"n": 1}], "nextPageToken": token(len(seen))})

    with pytest.raises(ProviderError) as caught:
        read_list(clock, answer)
    assert caught.value.kind == "protocol" and len(seen) <= 200


KINDS = [
    (400, {"x-amzn-errortype": "ConflictException:http://internal/"}, {"message": "m"}, "exists", "ConflictException"),
    (
        400,
        {"x-amzn-errortype": "ServiceQuotaExceededException"},
        {"message": "m"},
        "quota",
        "ServiceQuotaExceededException",
    ),
    (400, {"x-amzn-errortype": "ValidationException"}, {"message": "m"}, "invalid", "ValidationException"),
    (429, {"x-amzn-errortype": "ThrottlingException"}, {"message": "m"}, "limited", "ThrottlingException"),
    (409, {}, {"code": 6, "status": "ALREADY_EXISTS", "message": "m"}, "exists", "ALREADY_EXISTS"),
    (
        403,
        {},
        {"error": {"code": 403, "status": "PERMISSION_DENIED", "message": "m"}},
        "permission",
        "PERMISSION_DENIED",
    ),
]


@pytest.mark.parametrize(("status", "headers", "body", "kind", "code"), KINDS, ids=str)
def test_a_refusal_is_told_by_its_kind_and_the_services_own_code(status, headers, body, kind, code):
    error = read_refusal(Answer(status=status, headers=headers, body=body), "service", retry_after=None, attempts=1)
    assert (error.kind, error.provider_code) == (kind, code) and "m (HTTP" in str(error)


@pytest.mark.parametrize("answer", [{}, {"id": None}, {"id": ""}, {"id": True}, {"object": "list", "data": []}])
def test_an_answer_that_is_no_job_is_an_error_of_the_service(answer):
    with pytest.raises(ProviderError) as caught:
        read_wire_job(answer)
    assert caught.value.code == "provider-protocol"
