"""Files by address: the rows, places and errors of the same files here, through any of fsspec's file systems."""

from __future__ import annotations

import gzip
import http.server
import json
import threading

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from luthier import LuthierError
from luthier.data.prepare import prepare_data
from luthier.data.read.sources import read_source
from luthier.data.stream.stream_feed import StreamFeed
from luthier.recipe.schema import Data, Source
from luthier.testing import expect_error

ROWS = [{"text": f"row {i} é"} for i in range(30)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def as_parquet():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.json": json.dumps(ROWS).encode(),
    "a.csv": b"text\n" + "".join(f"{row['text']}\n" for row in ROWS).encode(),
    "a.parquet": as_parquet(),
    "a.txt": "\n\n".join(row["text"] for row in ROWS).encode(),
}


@pytest.fixture
def memory():
    """A folder in fsspec's own memory with these files; what stands there is taken away."""
    system = fsspec.filesystem("memory")
    for name, content in FILES.items():
        system.pipe(f"/bucket/{name}", content)
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


@pytest.fixture
def web(tmp_path):
    """A server on this machine with these files, and what it was asked for."""
    pytest.importorskip("aiohttp")
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def rows_of(address, **options):
    return [row.whole for row in read_source(Source(path=address, **options))]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_read_from_memory(name, memory):
    found = rows_of(f"{memory}/{name}")
    assert [row.values for row in found] == ROWS
    assert found[0].where.startswith(f"{memory}/{name}:")


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_read_from_the_web(name, web):
    found = rows_of(f"{web}/{name}?key=secret")
    assert [row.values for row in found] == ROWS
    assert found[0].where.startswith(f"{web}/{name}:") and "secret" not in found[0].where


def test_a_glob_is_read_in_the_order_of_its_names(memory):
    fsspec.filesystem("memory").pipe("/bucket/b.jsonl", b'{"text": "last"}\n')
    found = rows_of(f"{memory}/*.jsonl")
    assert [row.values for row in found] == [*ROWS, {"text": "last"}]
    assert found[-1].where == f"{memory}/b.jsonl:1"


def test_the_tokens_are_those_of_the_file_here(memory, tmp_path, chat):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    here, there, local = (
        prepare_data(Data(train=[Source(path=path)]), chat(None), seed=0)
        for path in (str(tmp_path / "a.jsonl"), f"{memory}/a.jsonl", f"file://{tmp_path}/a.jsonl")
    )
    assert here.train.fingerprint == there.train.fingerprint == local.train.fingerprint


def test_a_stream_of_addresses_goes_on_where_it_was_and_knows_other_files(memory, chat):
    def stream():
        return prepare_data(Data(train=[Source(path=f"{memory}/a.jsonl.gz")], streaming=True), chat(None), seed=0).train

    def feed():
        return StreamFeed(stream=stream(), batch=4, seed=0, buffer=8, epochs=2)

    def told(portions):
        return [[example.where for example in portion.examples] for portion in portions]

    whole = list(feed().portions(0))
    again = feed()
    again.load_state(feed().state(whole[4]))
    assert told(again.portions(5)) == told(whole[5:])
    before = stream().fingerprint
    assert before == stream().fingerprint
    fsspec.filesystem("memory").pipe("/bucket/a.jsonl.gz", gzip.compress(LINES * 2))
    assert stream().fingerprint != before


def test_what_is_not_there_is_said_with_its_address(memory, web):
    for address in (
        f"{memory}/no.jsonl",
        f"{memory}/*.tsv",
        f"{web}/no.jsonl?key=secret",
        "http://127.0.0.1:9/a.jsonl",
    ):
        with pytest.raises(LuthierError) as caught:
            rows_of(address)
        assert caught.value.code == "data-not-found" and caught.value.where == address.partition("?")[0]
    with pytest.raises(LuthierError, match="a folder") as caught:
        rows_of(memory)
    assert caught.value.code == "data-unreadable"


def test_damage_is_said_with_address_and_line(memory):
    fsspec.filesystem("memory").pipe("/bucket/a.jsonl.gz", gzip.compress(LINES)[:-20])
    with expect_error("data-unreadable", "memory://bucket/a.jsonl.gz:25") as caught:
        rows_of(f"{memory}/a.jsonl.gz")
    assert caught.value.where.startswith(f"{memory}/a.jsonl.gz")


def test_an_address_of_no_known_system_is_refused():
    with expect_error("data-unreadable", "nosuch://bucket/a.jsonl") as caught:
        rows_of("nosuch://bucket/a.jsonl")
    assert caught.value.code == "data-unreadable"
