"""A part of a file reads like a file that holds nothing else, and is sent again from its beginning."""

import asyncio
import io
import os

from hypothesis import given
from hypothesis import strategies as st
from luthier import ServiceClient
from luthier.jobs.transport.file_bodies import FilePart
from luthier.jobs.transport.service_client import Call
from luthier.testing.loopback import Fault, LoopbackServer, Reply

BYTES = bytes(range(251)) * 3
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(-1, 300)),
        st.tuples(st.just("seek"), st.integers(0, 300)),
        st.tuples(st.just("end"), st.integers(-5, 5)),
    ),
    max_size=8,
)


@given(begin=st.integers(0, 800), size=st.integers(0, 800), acts=ACTS)
def test_a_part_is_read_and_sought_like_a_file_of_its_bytes(begin, size, acts):
    part, expected = FilePart(io.BytesIO(BYTES), begin, size), io.BytesIO(BYTES[begin : begin + size])
    for act, number in acts:
        if act == "read":
            assert part.read(number) == expected.read(number)
        elif act == "seek":
            assert part.seek(number) == expected.seek(number)
        elif number >= 0:
            assert part.seek(number, os.SEEK_END) == expected.seek(number, os.SEEK_END)
        assert part.tell() == expected.tell()


def test_a_part_whose_answer_was_lost_is_sent_again_whole(clock, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(BYTES)
    server = LoopbackServer(lambda request: Reply(body={"id": "1"}))
    server.faults = [Fault(kind="lost"), Fault(kind="answer", reply=Reply(status=503, body={}))]

    async def send():
        client = ServiceClient(server.url, service="service", clock=clock, rate=1e6)
        try:
            with path.open("rb") as stream:
                part = {"data": ("part", FilePart(stream, 100, 300), "application/octet-stream")}
                await client.send_call(Call(method="POST", path="/parts", parts=part))
        finally:
            await client.close()

    with server.running():
        asyncio.run(send())
    assert [request.form()["data"] for request in server.requests] == [BYTES[100:400]] * 3
