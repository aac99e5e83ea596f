"""HTTP as a service meets it: what is sent again and what is not, where keys go, and how files come and go whole."""

import asyncio
import hashlib
import io
import logging
import os
import tarfile
from email.utils import formatdate

import pytest
from luthier import LuthierError, ProviderError, Secret, ServiceClient, Wanted, download_file, unpack_archive
from luthier.jobs.transport.retry_policy import read_retry_after
from luthier.testing import expect_error
from luthier.testing.loopback import Fault, LoopbackServer, Reply

CANARY = "canary-7c1d-9f-3e-transport"
BYTES = os.urandom(300_000)
SHA = hashlib.sha256(BYTES).hexdigest()


def answer(request):
    if request.path == "/file":
        begin = int((request.headers.get("range") or "bytes=0-")[6:-1])
        if begin:
            headers = {"content-range": f"bytes {begin}-{len(BYTES) - 1}/{len(BYTES)}", "etag": '"1"'}
            return Reply(body=BYTES[begin:], status=206, headers=headers)
        return Reply(body=BYTES, headers={"etag": '"1"'})
    if request.path == "/moved":
        return Reply(status=302, headers={"location": f"{server_url[0]}/file?X-Amz-Signature={CANARY}"})
    if request.path == "/upload":
        form = request.form()
        return Reply(body={"size": len(form["file"]), "purpose": form["purpose"].decode()})
    return Reply(body={"path": request.path, "method": request.method})


server_url = []


@pytest.fixture
def server():
    made = LoopbackServer(answer)
    with made.running():
        server_url[:] = [made.url]
        yield made


@pytest.fixture
def ask(server, clock):
    """Run `act(client)` with a client of the server."""

    def run(act):
        async def inside():
            client = ServiceClient(server.url, service="service", clock=clock, rate=1e6,
                                   headers=lambda: {"authorization": Secret(CANARY).with_prefix("Bearer ")})  # fmt: skip
            try:
                return await act(client)
            finally:
                await client.close()

        return asyncio.run(inside())

    return run


@pytest.mark.parametrize("fault", [Fault(kind="answer", reply=Reply(status=s, body={})) for s in (408, 429, 500, 502, 503, 504)]
                         + [Fault(kind="lost"), Fault(kind="refused")], ids=lambda f: f"{f.kind}{f.reply.status if f.reply else ''}")  # fmt: skip
def test_a_read_that_fails_in_passing_is_sent_again(server, ask, fault):
    server.faults = [Fault(kind=fault.kind, reply=fault.reply)]
    assert ask(lambda client: client.read_json("/x"))["path"] == "/x"
    assert len(server.requests) == 2


def test_reads_beside_each_other_renew_a_key_once(clock):
    keys = ["first-key", "second-key"]

    def know_the_second(request):
        known = request.headers["authorization"] == "Bearer second-key"
        return Reply(body={"path": request.path}) if known else Reply(status=401, body={})

    server = LoopbackServer(know_the_second)

    async def inside():
        client = ServiceClient(server.url, service="service", clock=clock, rate=1e6, renew=lambda: keys.pop(0),
                               headers=lambda: {"authorization": Secret(keys[0]).with_prefix("Bearer ")})  # fmt: skip
        try:
            return await asyncio.gather(*(client.read_json(f"/{i}") for i in range(3)))
        finally:
            await client.close()

    with server.running():
        assert [answer["path"] for answer in asyncio.run(inside())] == ["/0", "/1", "/2"]
    sent = [request.headers["authorization"] for request in server.requests]
    assert sent.count("Bearer second-key") == 3 and "Bearer first-key" in sent and keys == ["second-key"]


@pytest.mark.parametrize("fault", [Fault(kind="lost"), Fault(kind="cut"), Fault(kind="answer", reply=Reply(status=502, body={}))],
                         ids=lambda f: f.kind)  # fmt: skip
def test_a_create_is_sent_once(server, ask, fault):
    server.faults = [fault]
    with pytest.raises(ProviderError) as caught:
        ask(lambda client: client.post_json("/jobs", {}))
    assert caught.value.may_have_created
    assert len(server.requests) == 1


def test_a_create_that_was_turned_away_for_its_rate_is_sent_again_after_the_time_asked(server, ask, clock):
    server.faults = [Fault(kind="answer", reply=Reply(status=429, body={}, headers={"retry-after": "3"}))]
    ask(lambda client: client.post_json("/jobs", {}))
    assert 3.0 in clock.slept
    assert len(server.requests) == 2


@pytest.mark.parametrize(("status", "body", "kind"), [
    (401, {"error": {"message": "bad key"}}, "auth"), (403, {"code": 7, "message": ""}, "permission"),
    (429, {"error": {"code": "insufficient_quota", "message": "pay"}}, "quota"), (402, {}, "quota"),
    (400, {"error": {"message": "n_epochs", "param": "n_epochs"}}, "invalid"), (404, {}, "not_found"),
    (410, {}, "ended"), (302, {}, "protocol"),
])  # fmt: skip
def test_what_no_repetition_helps_is_asked_once(server, ask, status, body, kind):
    server.faults = [
        Fault(kind="answer", times=9, reply=Reply(status=status, body=body, headers={"x-request-id": "r-7"}))
    ]
    with pytest.raises(ProviderError) as caught:
        ask(lambda client: client.read_json("/x"))
    assert (caught.value.kind, caught.value.http_status, caught.value.request_id) == (kind, status, "r-7")
    assert len(server.requests) == 1


def test_a_service_that_stays_down_is_told_with_its_attempts(server, ask):
    server.faults = [Fault(kind="answer", times=99, reply=Reply(status=503, body={}))]
    with pytest.raises(ProviderError, match="6 attempts") as caught:
        ask(lambda client: client.read_json("/x"))
    assert (caught.value.kind, caught.value.exit_status) == ("server", 75)


def test_a_day_is_not_waited_for(server, ask, clock):
    server.faults = [Fault(kind="answer", times=9, reply=Reply(status=429, body={}, headers={"retry-after": "86400"}))]
    with pytest.raises(ProviderError) as caught:
        ask(lambda client: client.read_json("/x"))
    assert (caught.value.retry_after, len(server.requests)) == (86400.0, 1)
    assert max(clock.slept, default=0) < 1


def test_retry_after_is_read_as_seconds_and_as_a_date():
    assert read_retry_after("7", 0.0) == 7.0
    assert read_retry_after(formatdate(1000.0, usegmt=True), 990.0) == 10.0
    assert read_retry_after("soon", 0.0) is None


@pytest.mark.parametrize("body", [b"<html>oops</html>", b'{"a": ', b'{"error": {"message": "no"}}'])
def test_an_answer_that_is_not_what_was_promised_is_an_error(server, ask, body):
    server.faults = [Fault(kind="answer", reply=Reply(status=200, body=body))]
    with pytest.raises(ProviderError):
        ask(lambda client: client.read_json("/x"))


def test_an_address_in_clear_text_is_refused_but_on_this_machine():
    for address in ("http://service.example", "ftp://service.example", "https://user:pw@service.example"):
        with pytest.raises(LuthierError) as caught:
            ServiceClient(address, service="service")
        assert caught.value.code == "insecure-url"
        assert "pw" not in str(caught.value)


def test_a_file_is_sent_as_a_stream_and_its_progress_told(server, ask, tmp_path):
    path, told = tmp_path / "f.jsonl", []
    path.write_bytes(BYTES)
    fields = {"purpose": "fine-tune"}
    done = ask(lambda c: c.send_file("/upload", path, fields=fields, progress=lambda a, b: told.append((a, b))))
    assert done == {"size": len(BYTES), "purpose": "fine-tune"}
    assert told == sorted(told) and told[-1] == (len(BYTES), len(BYTES))
    server.faults = [Fault(kind="lost"), Fault(kind="answer", reply=Reply(status=503, body={}))]
    assert ask(lambda c: c.send_file("/upload", path, fields=fields))["size"] == len(BYTES)


def test_a_signed_link_gets_no_key(server, ask, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(BYTES)
    ask(lambda client: client.put_file(f"{server.url}/put?X-Amz-Signature=s", path))
    assert server.requests[-1].body == BYTES
    assert "authorization" not in server.requests[-1].headers


def fetch(ask, tmp_path, address="/file", **wanted):
    target = tmp_path / "got/file.bin"
    ask(lambda client: download_file(client, Wanted(address=address, **wanted), target))
    return target


def test_a_download_that_was_cut_is_resumed(server, ask, tmp_path):
    server.faults = [Fault(kind="cut")]
    assert fetch(ask, tmp_path, size=len(BYTES), sha256=SHA).read_bytes() == BYTES
    assert server.requests[-1].headers["range"] == f"bytes={len(BYTES) // 2}-"
    assert [p.name for p in (tmp_path / "got").iterdir()] == ["file.bin"]


def test_a_download_of_an_earlier_process_is_resumed(server, ask, tmp_path):
    (tmp_path / "got").mkdir()
    (tmp_path / "got/file.bin.partial").write_bytes(BYTES[:1000])
    assert fetch(ask, tmp_path).read_bytes() == BYTES
    assert [r.headers.get("range") for r in server.requests] == ["bytes=1000-"]


def test_a_service_that_does_not_resume_is_read_from_the_beginning(server, ask, tmp_path):
    (tmp_path / "got").mkdir()
    (tmp_path / "got/file.bin.partial").write_bytes(b"x" * 1000)
    server.faults = [Fault(kind="answer", reply=Reply(body=BYTES))]
    assert fetch(ask, tmp_path).read_bytes() == BYTES


def test_a_redirected_download_takes_no_key_along(server, ask, tmp_path):
    assert fetch(ask, tmp_path, "/moved").read_bytes() == BYTES
    assert [r.headers.get("authorization") for r in server.requests] == [f"Bearer {CANARY}", None]


@pytest.mark.parametrize("wanted", [{"size": 5}, {"sha256": "0" * 64}])
def test_a_file_that_is_not_what_was_promised_gets_no_name(server, ask, tmp_path, wanted):
    with pytest.raises(LuthierError) as caught:
        fetch(ask, tmp_path, **wanted)
    assert caught.value.code == "download-damaged"
    assert list((tmp_path / "got").iterdir()) == []


def test_a_signed_link_that_has_expired_is_asked_for_again(server, ask, tmp_path):
    server.faults = [Fault(kind="answer", reply=Reply(status=403, body=b"expired"))]
    renewed = []

    async def renew():
        renewed.append(1)
        return f"{server.url}/file"

    fetch(ask, tmp_path, f"{server.url}/file?old", bare=True, renew=renew)
    assert renewed == [1]


def test_no_key_is_logged_at_any_level(server, ask, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        fetch(ask, tmp_path, "/moved")
        server.faults = [Fault(kind="answer", reply=Reply(status=400, body={"message": f"key {CANARY} is bad"}))]
        with pytest.raises(ProviderError) as caught:
            ask(lambda client: client.post_json("/jobs", {"key": CANARY}))
    assert CANARY not in caplog.text + str(caught.value) + repr(caught.value)
    assert "/moved" in caplog.text


def archive(tmp_path, *members):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind != tarfile.REGTYPE else ""
            info.size = 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"abc") if info.size else None)
    return path


def test_an_archive_is_unpacked(tmp_path):
    files = unpack_archive(archive(tmp_path, ("a/b.txt", tarfile.REGTYPE)), tmp_path / "out")
    assert files == [tmp_path / "out/a/b.txt"]


@pytest.mark.parametrize("member", [("../out.txt", tarfile.REGTYPE), ("a/../../b", tarfile.REGTYPE), ("link", tarfile.SYMTYPE),
                                    ("hard", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE)])  # fmt: skip
def test_an_archive_that_would_leave_its_folder_is_refused_whole(tmp_path, member):
    with pytest.raises(LuthierError) as caught:
        unpack_archive(archive(tmp_path, ("good.txt", tarfile.REGTYPE), member), tmp_path / "out")
    assert caught.value.code == "archive-unsafe"
    assert not (tmp_path / "out").exists()


def test_an_archive_that_is_larger_than_allowed_or_broken_is_refused(tmp_path):
    path = archive(tmp_path, ("a", tarfile.REGTYPE), ("b", tarfile.REGTYPE))
    with expect_error("archive-unsafe", "a.tar.gz", "5"):
        unpack_archive(path, tmp_path / "out", most=5)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(LuthierError) as caught:
        unpack_archive(path, tmp_path / "out")
    assert caught.value.code == "archive-damaged"


@pytest.mark.parametrize(
    ("status", "code"),
    [(402, "provider-quota"), (404, "provider-not-found"), (409, "provider-exists"), (410, "provider-ended"),
     (422, "provider-invalid"), (429, "provider-limited"), (500, "provider-failed"), (302, "provider-protocol")],
)  # fmt: skip
def test_a_refused_create_says_by_its_code_what_was_refused(server, ask, status, code):
    server.faults = [
        Fault(kind="answer", times=9, reply=Reply(status=status, body={}, headers={"retry-after": "86400"}))
    ]
    with pytest.raises(ProviderError) as caught:
        ask(lambda client: client.post_json("/jobs", {}))
    assert caught.value.code == code


def test_an_address_where_nobody_listens_is_unreachable(ask, clock):
    async def inside():
        client = ServiceClient("http://127.0.0.1:9", service="service", clock=clock, rate=1e6)
        try:
            await client.post_json("/jobs", {})
        finally:
            await client.close()

    with pytest.raises(ProviderError) as caught:
        asyncio.run(inside())
    assert caught.value.code == "provider-unreachable"
