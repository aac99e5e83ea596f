"""Files of s3://, gs:// and hf://: read from a service on this machine, with the real clients that are installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from html import escape

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from luthier import LuthierError
from luthier.data.prepare import prepare_data
from luthier.data.read.sources import read_source
from luthier.data.stream.stream_feed import StreamFeed
from luthier.recipe.schema import Data, Source
from luthier.testing import expect_error
from luthier.testing.loopback import LoopbackServer, Reply

ROWS = [{"text": f"row {i} é"} for i in range(30)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
DATE = "Sat, 28 Nov 2026 10:00:00 GMT"


def ranged(content, request, **headers):
    """The answer to a request for a file, or for a part of it."""
    headers = {"ETag": f'"{len(content)}"', "Last-Modified": DATE, "Accept-Ranges": "bytes", **headers}
    asked = request.headers.get("range", "")
    if request.method == "HEAD":
        return Reply(body=b"", headers={**headers, "content-length": str(len(content))})
    if not asked:
        return Reply(body=content, headers=headers)
    first, _, last = asked.removeprefix("bytes=").partition("-")
    start, end = int(first), min(int(last or len(content)), len(content) - 1)
    part = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
    return Reply(body=content[start : end + 1], status=206, headers={**headers, **part})


class S3:
    """A bucket of S3: its list, and its objects."""

    address, extra, module = "s3://bucket", "s3", "s3fs"
    options = {"key": "id", "secret": "secret"}

    def __init__(self, files):
        self.files = {f"/bucket/{name}": content for name, content in files.items()}

    def place(self, url):
        return {"endpoint_url": url}

    def answer(self, request):
        if "list-type" in request.query:
            return self.listed(request.first("prefix") or "")
        if (content := self.files.get(request.path)) is None:
            return Reply(body=b"<Error><Code>NoSuchKey</Code></Error>", status=404)
        return ranged(content, request)

    def listed(self, prefix):
        found = [(p.removeprefix("/bucket/"), c) for p, c in self.files.items() if p.startswith(f"/bucket/{prefix}")]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(content)}</Size><ETag>{len(content)}</ETag>"
            "<LastModified>2026-11-28T10:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for key, content in found
        )
        head = (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
        )
        tail = f"<KeyCount>{len(found)}</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
        return Reply(body=f"{head}{entries}{tail}".encode(), headers={"content-type": "application/xml"})


class Gs:
    """A bucket of Google Cloud Storage: its list, and its objects."""

    address, extra, module = "gs://bucket", "gs", "gcsfs"
    options = {"token": "anon"}

    def __init__(self, files):
        self.files = files

    def place(self, url):
        return {"endpoint_url": url}

    def answer(self, request):
        begin, _, key = request.path.partition("/b/bucket/o")
        key = key.lstrip("/")
        if not key and request.method == "GET" and "/b/bucket/o" in request.path:
            prefix = request.first("prefix") or ""
            return Reply(body={"items": [self.told(name) for name in self.files if name.startswith(prefix)]})
        if key not in self.files:
            return Reply(body={"error": {"code": 404, "message": "Not Found"}}, status=404)
        if "/download/" in f"{begin}/" or request.first("alt") == "media":
            return ranged(self.files[key], request)
        return Reply(body=self.told(key))

    def told(self, name):
        size = str(len(self.files[name]))
        return {"kind": "storage#object", "name": name, "bucket": "bucket", "size": size, "etag": size,
                "generation": size, "updated": "2026-11-28T10:00:00.000Z", "timeCreated": "2026-11-28T10:00:00.000Z"}  # fmt: skip


class Hub:
    """A dataset's repository of the Hugging Face hub: its tree, and its files."""

    address, extra, module = "hf://datasets/org/set", "", "huggingface_hub"
    options = {"token": False}

    def __init__(self, files):
        self.files = files

    def place(self, url):
        return {"endpoint": url}

    def answer(self, request):
        path = request.path
        if path.startswith("/api/datasets/org/set/tree/"):
            return Reply(body=[self.told(name) for name in self.files])
        if path.startswith("/api/datasets/org/set/paths-info/"):
            asked = request.json if "json" in request.headers["content-type"] else request.form()
            names = asked["paths"] if isinstance(asked["paths"], list) else [asked["paths"].decode()]
            return Reply(body=[self.told(name) for name in names if name in self.files])
        if path.startswith("/api/datasets/org/set"):
            return Reply(body={"_id": "1", "id": "org/set", "sha": "c" * 40, "siblings": []})
        name = path.rpartition("/")[2]
        if name not in self.files:
            return Reply(body={"error": "Entry not found"}, status=404, headers={"X-Error-Code": "EntryNotFound"})
        return ranged(self.files[name], request, **{"X-Repo-Commit": "c" * 40})

    def told(self, name):
        size = len(self.files[name])
        return {"type": "file", "oid": f"{size:040}", "size": size, "path": name}


def stand_in(scheme, files):
    """Let fsspec's own memory answer for a scheme whose client is not installed here."""

    class Stored(MemoryFileSystem):
        protocol, store, pseudo_dirs = (scheme,), {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix(f"{scheme}://"))

    for name, content in files.items():
        Stored().pipe(f"bucket/{name}", content)
    return Stored


@pytest.fixture(params=[S3, Gs, Hub], ids=["s3", "gs", "hf"])
def service(request, monkeypatch):
    """A service with two files, where the client of its addresses looks for it."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which asks another service of Google by gRPC
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read when the library was imported
    files = {"a.jsonl": LINES, "b.jsonl": b'{"text": "last"}\n'}
    made, scheme = request.param(files), request.param.address.partition("://")[0]
    registry = sys.modules["fsspec.registry"]._registry
    if importlib.util.find_spec(made.module) is None:
        monkeypatch.setitem(registry, scheme, stand_in(scheme, files))
        yield made
        return
    with LoopbackServer(made.answer).running() as server:
        monkeypatch.setitem(fsspec.config.conf, scheme, {**made.options, **made.place(server.url)})
        fsspec.get_filesystem_class(scheme).clear_instance_cache()
        yield made
        fsspec.get_filesystem_class(scheme).clear_instance_cache()


def rows_of(address):
    return [row.whole for row in read_source(Source(path=address))]


def test_rows_and_places_are_those_of_the_file(service):
    found = rows_of(f"{service.address}/a.jsonl")
    assert [row.values for row in found] == ROWS
    assert found[0].where == f"{service.address}/a.jsonl:1"


def test_a_glob_is_read_in_the_order_of_its_names(service):
    found = rows_of(f"{service.address}/*.jsonl")
    assert [row.values for row in found] == [*ROWS, {"text": "last"}]
    assert found[-1].where == f"{service.address}/b.jsonl:1"


def test_a_stream_goes_on_where_it_was(service, chat):
    def feed():
        data = Data(train=[Source(path=f"{service.address}/a.jsonl")], streaming=True)
        return StreamFeed(stream=prepare_data(data, chat(None), seed=0).train, batch=4, seed=0, buffer=8, epochs=2)

    def told(portions):
        return [[example.where for example in portion.examples] for portion in portions]

    whole = list(feed().portions(0))
    again = feed()
    again.load_state(feed().state(whole[4]))
    assert told(again.portions(5)) == told(whole[5:])
    assert again.stream.fingerprint == feed().stream.fingerprint


def test_a_file_that_is_not_there_is_said_with_its_address(service):
    for name in ("no.jsonl", "*.tsv"):
        with expect_error("data-not-found", f"{service.address}/{name}"):
            rows_of(f"{service.address}/{name}")


@pytest.mark.parametrize(
    ("scheme", "extra", "module"),
    [("s3", "s3", "s3fs"), ("s3a", "s3", "s3fs"), ("gs", "gs", "gcsfs"), ("https", "http", "aiohttp")],
)
def test_a_client_that_is_not_installed_is_named_with_its_extra(scheme, extra, module, monkeypatch):
    """fsspec's own answer where the import fails, as it does without the extra."""
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(LuthierError, match=f"luthier\\[{extra}\\]") as caught:
        rows_of(f"{scheme}://user:password@bucket/a.jsonl")
    assert (caught.value.code, caught.value.where) == ("dependency-missing", f"{scheme}://bucket/a.jsonl")
