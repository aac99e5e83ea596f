"""Large files to and from a service: our client beside plain httpx. Each download is cut in the middle once."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from tests.speed.table import Row

BLOCK: Final = bytes(range(256)) * 4096  # 1 MiB
PART: Final = 64 * 2**20  # bytes of one part of an upload


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=1.0)


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    size = int(arguments.gigabytes * 2**30) // len(BLOCK) * len(BLOCK)
    context = multiprocessing.get_context("spawn")
    ends, other = context.Pipe()
    server = context.Process(target=_serve, args=(other, size), daemon=True)
    server.start()
    url = ends.recv()
    try:
        for name in ("download", "upload in parts", "upload to a signed link"):
            found = {side: _apart(side, name, url, size) for side in ("ours", "httpx")}
            more = {f"{what}_{side}": found[side][what] for side in found for what in ("growth_mb", "requests")}
            rates = [size / 2**20 / found[side][arguments.clock] for side in ("ours", "httpx")]
            case = f"{name}, {size / 2**30:.2g} GiB"
            yield Row.rate(case, *rates, f"MiB/s ({arguments.clock})", more={**more, "whole": found["ours"]["whole"]})
    finally:
        server.terminate()
        server.join()


def _apart(side: str, name: str, url: str, size: int) -> dict[str, Any]:
    """What a side takes in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, side, name, url, size).result()


def _measured(side: str, name: str, url: str, size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        if name != "download":
            with path.open("wb") as file:
                for _ in range(size // len(BLOCK)):
                    file.write(BLOCK)
        began, cpu = time.perf_counter(), time.process_time()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work = (_ours if side == "ours" else _plain)(name, url, path)
        requests = asyncio.run(work)
        numbers = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu, "requests": requests}
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        return {**numbers, "growth_mb": growth, "whole": path.stat().st_size == size}


async def _ours(name: str, url: str, path: Path) -> int:
    from luthier import ServiceClient
    from luthier.jobs.transport.file_download import Wanted, download_file
    from luthier.jobs.transport.file_hash import hash_file
    from luthier.jobs.wire.part_upload import send_in_parts
    from luthier.plugins.providing.job_records import DataFile

    client = ServiceClient(url, service="service", rate=1000.0)
    try:
        if name == "download":
            digest = (await client.read_json("/sha256"))["sha256"]
            await client.read_json("/cut")
            await download_file(client, Wanted(address="/file", sha256=digest), path)
        elif name == "upload in parts":
            file = DataFile(role="training", path=path, size=path.stat().st_size, sha256=hash_file(path), rows=1)
            note = path.with_suffix(".json")
            await send_in_parts(client, lambda place: place, file, note=note, name="f", size=PART, progress=None)
        else:
            await client.put_file(f"{url}/signed", path)
        return (await client.read_json("/count"))["count"]
    finally:
        await client.close()


async def _plain(name: str, url: str, path: Path) -> int:
    import httpx

    async with httpx.AsyncClient(timeout=600.0) as client:
        if name == "download":
            digest = hashlib.sha256()
            with path.open("wb") as file:
                async with client.stream("GET", f"{url}/file") as answer:
                    async for block in answer.aiter_raw():
                        file.write(block)
                        digest.update(block)
            assert digest.hexdigest() == (await client.get(f"{url}/sha256")).json()["sha256"]
        elif name == "upload in parts":
            with path.open("rb") as stream:
                while block := stream.read(PART):
                    await client.post(f"{url}/uploads/1/parts", files={"data": ("part", block)})
        else:

            async def blocks():  # noqa: ANN202
                with path.open("rb") as stream:
                    while block := stream.read(2**18):
                        yield block

            length = {"content-length": str(path.stat().st_size)}
            await client.put(f"{url}/signed", content=blocks(), headers=length)
        return (await client.get(f"{url}/count")).json()["count"]


def _serve(pipe: Any, size: int) -> None:
    """Serve a file of `size` bytes that is the same block again and again, and take uploads, which are thrown away."""
    digest = hashlib.sha256()
    for _ in range(size // len(BLOCK)):
        digest.update(BLOCK)
    state: dict[str, Any] = {"cut": False, "count": 0, "sha256": digest.hexdigest()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/file":
                state["count"] += 1
                return self._send_file()
            answer = {"/sha256": {"sha256": state["sha256"]}, "/count": {"count": state["count"]}, "/cut": {}}
            if self.path == "/cut":
                state["cut"] = True
            self._send_json(answer[self.path])
            if self.path == "/count":
                state["count"] = 0
            return None

        def _send_file(self) -> None:
            found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "bytes=0-")
            begin, cut = int(found[1]) if found else 0, state["cut"]
            state["cut"] = False
            self.send_response(206 if begin else 200)
            self.send_header("content-length", str(size - begin))
            self.send_header("etag", '"1"')
            if begin:
                self.send_header("content-range", f"bytes {begin}-{size - 1}/{size}")
            self.end_headers()
            place, end = begin, size // 2 if cut else size
            while place < end:
                offset = place % len(BLOCK)
                place += self.wfile.write(BLOCK[offset : offset + min(len(BLOCK) - offset, end - place)])
            self.close_connection = cut

        def do_POST(self) -> None:
            state["count"] += 1
            self._read_away()
            self._send_json({"id": str(state["count"]), "file": {"id": "f"}})

        do_PUT = do_POST

        def _read_away(self) -> None:
            left = int(self.headers.get("content-length") or 0)
            while left:
                left -= len(self.rfile.read(min(left, 2**20)))

        def _send_json(self, document: Any) -> None:
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *_: Any) -> None:
            """Write nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pipe.send(f"http://127.0.0.1:{server.server_address[1]}")
    server.serve_forever()
