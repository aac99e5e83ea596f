"""A server on this machine around a fake service. It records requests, and fails as the test orders."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import attrs

FaultKind = Literal["answer", "masked", "lost", "refused", "cut"]


@attrs.frozen(kw_only=True)
class Request:
    """A request as the service sees it: header names in lower case, the path unquoted and without its query."""

    method: str
    path: str
    raw_path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Return the body as JSON; an empty body is an empty object."""
        return json.loads(self.body) if self.body else {}

    def first(self, name: str) -> str | None:
        """Return the first value of a field of the query."""
        return self.query.get(name, [None])[0]

    def form(self) -> dict[str, bytes]:
        """Return the fields of a form, multipart or plain; a file's name is under `FIELD.filename`."""
        kind = self.headers.get("content-type", "")
        if not kind.startswith("multipart/"):
            return {k: v[0].encode() for k, v in parse_qs(self.body.decode(), keep_blank_values=True).items()}
        message = BytesParser(policy=HTTP).parsebytes(f"content-type: {kind}\r\n\r\n".encode() + self.body)
        fields: dict[str, bytes] = {}
        parts: Any = message
        for part in parts.iter_parts():
            name = str(part.get_param("name", header="content-disposition"))
            fields[name] = bytes(part.get_payload(decode=True))
            file_name = part.get_filename()
            if file_name:
                fields[f"{name}.filename"] = file_name.encode()
        return fields


@attrs.frozen(kw_only=True)
class Reply:
    """An answer. `body` is bytes, or a value that is sent as JSON."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = attrs.field(factory=dict)


@attrs.define(kw_only=True)
class Fault:
    """A fault that befalls requests whose method and path match, `times` times.

    `answer`: the reply replaces the service's act. `masked`: the service acts, but the reply hides its answer.
    `lost`: the service acts, and no answer comes. `refused`: the connection ends before the service acts. `cut`: half
    of the answer's body comes.
    """

    kind: FaultKind
    method: str = ".*"
    path: str = ".*"
    times: int = 1
    reply: Reply | None = None

    def meets(self, request: Request) -> bool:
        """Return True, and count it, if the fault befalls this request."""
        fits = re.fullmatch(self.method, request.method) and re.search(self.path, request.path)
        if not fits or self.times < 1:
            return False
        self.times -= 1
        return True


class LoopbackServer:
    """A server of `answer` on this machine. `requests` lists what came, `faults` what will go wrong, in order."""

    def __init__(self, answer: Callable[[Request], Reply]) -> None:
        self.answer, self.requests = answer, list[Request]()
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def take(self, request: Request) -> tuple[Reply | None, bool]:
        """Return the reply (None for no answer), and True if only half of it is sent."""
        with self._lock:
            self.requests.append(request)
            fault = next((f for f in self.faults if f.meets(request)), None)
            if fault is not None and fault.kind == "refused":
                return None, False
            if fault is not None and fault.kind == "answer":
                return fault.reply or Reply(status=500), False
            reply = self.answer(request)
            if fault is not None and fault.kind in ("lost", "masked"):
                return (fault.reply or Reply(status=500)) if fault.kind == "masked" else None, False
            return reply, fault is not None

    def count(self, method: str, path: str) -> int:
        """Return how many requests of a method had a path that matches."""
        return sum(r.method == method and re.search(path, r.path) is not None for r in self.requests)

    @contextlib.contextmanager
    def running(self) -> Iterator[LoopbackServer]:
        """Serve within this context."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def _handler(server: LoopbackServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def handle_any(self) -> None:
            reply, half = server.take(_read_request(self))
            if reply is None:
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            _write_reply(self, reply, half=half)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_any

        def log_message(self, format: str, *_: Any) -> None:
            """Write nothing."""

    return Handler


def _read_request(handler: BaseHTTPRequestHandler) -> Request:
    parts = urlsplit(handler.path)
    headers = {name.lower(): value for name, value in handler.headers.items()}
    return Request(
        method=handler.command,
        path=unquote(parts.path),
        raw_path=parts.path,
        query=parse_qs(parts.query, keep_blank_values=True),
        headers=headers,
        body=_read_body(handler, headers),
    )


def _read_body(handler: BaseHTTPRequestHandler, headers: Mapping[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return handler.rfile.read(int(headers.get("content-length") or 0))
    blocks = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        blocks.append(handler.rfile.read(size))
        handler.rfile.readline()
    handler.rfile.readline()
    return b"".join(blocks)


def _write_reply(handler: BaseHTTPRequestHandler, reply: Reply, *, half: bool) -> None:
    is_bytes = isinstance(reply.body, bytes)
    body = reply.body if is_bytes else b"" if reply.status == 204 else json.dumps(reply.body).encode()
    kind = "application/octet-stream" if is_bytes else "application/json"
    with contextlib.suppress(OSError):  # the client may have gone
        handler.send_response(reply.status)
        for name, value in {"content-type": kind, "content-length": str(len(body)), **reply.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            handler.close_connection = True
