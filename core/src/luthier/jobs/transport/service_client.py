"""The client of one service.

Reads are sent again after a passing failure; a change only if its caller says that it may be repeated. Redirects are
never followed here, and links that carry their own signature go through a second client that knows no key.
"""

from __future__ import annotations

import os
import random
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import attrs
import httpx

from luthier.errors import LuthierError
from luthier.jobs.clock import Clock, current_clock
from luthier.jobs.provider_error import ProviderError
from luthier.jobs.secret import Secret, redact_link
from luthier.jobs.transport.answer_errors import Answer, read_refusal, unreadable_answer
from luthier.jobs.transport.file_bodies import CountedFile, send_blocks
from luthier.jobs.transport.http_log import guard_loggers
from luthier.jobs.transport.pace import Pace
from luthier.jobs.transport.request_auth import RenewedKeys, SignedRequests, Signer
from luthier.jobs.transport.request_turns import current_turns
from luthier.jobs.transport.retry_policy import PASSING, RetryPolicy, read_retry_after
from luthier.plugins.providing.job_records import Progress

LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
TIMES: Final = httpx.Timeout(connect=5.0, read=60.0, write=60.0, pool=10.0)
# seconds for one block, not for the file
FILE_TIMES: Final = httpx.Timeout(connect=5.0, read=600.0, write=600.0, pool=10.0)
UNSENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)

guard_loggers()


@attrs.frozen(kw_only=True)
class Call:
    """One request. `repeatable` says that it may be carried out twice; `accepted` are its good statuses."""

    method: str
    path: str
    params: Any = None
    json: Any = None
    content: bytes | None = None  # a body that is sent unchanged
    form: Mapping[str, str] | None = None
    parts: Any = None  # files of a form: field -> name, content and kind of its file
    repeatable: bool = True
    accepted: Sequence[int] = (200, 201, 202, 204)
    headers: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Opened:
    """An answer whose body has not been read yet."""

    status: int
    headers: Mapping[str, str]
    blocks: Callable[[], AsyncIterator[bytes]]


class ServiceClient:
    """A client that speaks HTTP to one service, at a limited pace and with careful repetition.

    `headers` is called before every request and returns what identifies the user, with a `Secret` for a key. `renew`
    forgets a key that the service has refused (401); if `headers` then returns another key, the request is sent once
    more. `signer` signs requests, for services that require it. `tls` says which certificates are trusted and holds
    the user's own, for services with their own authority. Requests are spaced to `rate` a second, counted over all
    clients of a manager and of other processes with the same folder of jobs; at most `together` are on their way. An
    answer may let `patience` seconds pass in silence. An address without TLS is refused unless
    it is this machine's own.
    """

    def __init__(
        self,
        base_url: str,
        *,
        service: str,
        headers: Callable[[], Mapping[str, str | Secret]] = dict,
        renew: Callable[[], None] | None = None,
        signer: Signer | None = None,
        tls: ssl.SSLContext | None = None,
        clock: Clock | None = None,
        rate: float = 10.0,
        together: int = 8,
        patience: float = 60.0,
        policy: RetryPolicy | None = None,
    ) -> None:
        check_address(base_url, f"{service}.base_url")
        self.base_url, self.service, self._headers = base_url.rstrip("/"), service, headers
        self.clock: Clock = clock or current_clock()
        self._policy, self._random = policy or RetryPolicy(), random.Random()
        self._pace = Pace(self.clock, self.base_url, rate, together, current_turns())
        trusted = tls or _trusted_authorities(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
        auth: httpx.Auth | None = RenewedKeys(self._revealed, renew) if renew is not None else None
        auth = SignedRequests(signer) if signer is not None else auth
        self._times = httpx.Timeout(connect=5.0, read=patience, write=60.0, pool=10.0)
        self._client = httpx.AsyncClient(timeout=self._times, verify=trusted, follow_redirects=False, auth=auth)
        self._bare = httpx.AsyncClient(timeout=FILE_TIMES, verify=trusted, follow_redirects=False)

    async def read_json(self, path: str, params: Any = None) -> Any:
        """GET a JSON document, repeatedly while the service fails in passing."""
        return self._document(await self.send_call(Call(method="GET", path=path, params=params)), path)

    async def post_json(self, path: str, body: Any = None, *, repeatable: bool = False) -> Any:
        """POST a JSON document. Unless `repeatable`, it is sent once, and a missing answer is a `lost` error."""
        answer = await self.send_call(Call(method="POST", path=path, json=body, repeatable=repeatable))
        return self._document(answer, path)

    async def send_call(self, call: Call) -> Answer:
        """Send a call and return its answer. An answer that the call does not accept is a `ProviderError`."""
        for attempt in range(1, self._policy.attempts + 1):
            last = attempt == self._policy.attempts
            try:
                answer = await self._send_once(call)
            except ProviderError as error:
                error.attempts = attempt
                safe = error.kind == "network" or (call.repeatable and error.kind == "lost")
                if last or not safe:
                    raise
                await self.clock.sleep(self._policy.draw_wait(attempt, self._random))
                continue
            if answer.status in call.accepted:
                return answer
            await self._wait_or_raise(call, answer, attempt, last=last)
        raise AssertionError("the last attempt returns or raises")

    async def send_file(self, path: str, file: Path, *, fields: Mapping[str, str], field: str = "file",
                        name: str | None = None, progress: Progress | None = None) -> Any:  # fmt: skip
        """POST a file as a form's field, streamed from disk.

        It is sent again if that fails, because a copy does no harm.
        """
        call = Call(method="POST", path=path, form=fields)
        for attempt in range(1, self._policy.attempts + 1):
            with file.open("rb") as stream:
                counted = CountedFile(stream, file.stat().st_size, progress)
                part = {field: (name or file.name, counted, "application/jsonl")}
                try:
                    answer = await self._send_once(call, files=part)
                except ProviderError as error:
                    if attempt == self._policy.attempts or error.kind not in ("network", "lost"):
                        raise
                    await self.clock.sleep(self._policy.draw_wait(attempt, self._random))
                    continue
            if answer.status in call.accepted:
                return self._document(answer, path)
            await self._wait_or_raise(call, answer, attempt, last=attempt == self._policy.attempts)
        raise AssertionError("the last attempt returns or raises")

    async def put_file(
        self, link: str, file: Path, *, progress: Progress | None = None, headers: Mapping[str, str] | None = None
    ) -> Mapping[str, str]:
        """PUT a file to a signed link, without any key, and return the answer's headers."""
        check_address(link, "upload link")
        size = file.stat().st_size
        given = {"content-length": str(size), "content-type": "application/octet-stream", **(headers or {})}
        with file.open("rb") as stream, _Translated(redact_link(link)):
            answer = await self._bare.put(link, content=send_blocks(stream, size, progress), headers=given)
        if answer.status_code >= 300:
            raise read_refusal(await _read_answer(answer), redact_link(link), retry_after=None, attempts=1)
        return {k.lower(): v for k, v in answer.headers.items()}

    @asynccontextmanager
    async def open_stream(
        self,
        address: str,
        *,
        params: Any = None,
        headers: Mapping[str, str] | None = None,
        bare: bool = False,
        post: Any = None,
    ) -> AsyncIterator[Opened]:
        """GET a body to read block by block: from a path of the service, or with `bare` from a signed link, without a
        key. With `post`, a JSON document, it is POSTed for.
        """
        method = "GET" if post is None else "POST"
        where = redact_link(address) if bare else self._where(method, address)
        if bare:
            check_address(address, "download link")
        client, link = (self._bare, address) if bare else (self._client, f"{self.base_url}{address}")
        given = {**({} if bare else self._revealed()), **(headers or {})}
        with _Translated(where, "" if bare else self.base_url):
            async with (
                self._pace.take_turn(),
                client.stream(method, link, params=params, json=post, headers=given, timeout=FILE_TIMES) as answer,
            ):
                named = {k.lower(): v for k, v in answer.headers.items()}
                if answer.status_code >= 400:
                    await answer.aread()
                    raise read_refusal(await _read_answer(answer), where, retry_after=None, attempts=1)
                yield Opened(status=answer.status_code, headers=named, blocks=answer.aiter_raw)

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()
        await self._bare.aclose()

    async def _send_once(self, call: Call, files: Any = None) -> Answer:
        link = f"{self.base_url}{call.path}"
        headers = {**self._revealed(), **call.headers}
        files = files or call.parts
        times = FILE_TIMES if files else self._times
        async with self._pace.take_turn():
            with _Translated(self._where(call.method, call.path), self.base_url):
                answer = await self._client.request(
                    call.method, link, params=call.params, json=call.json, content=call.content, data=call.form,
                    files=files, headers=headers, timeout=times,
                )  # fmt: skip
        return await _read_answer(answer)

    async def _wait_or_raise(self, call: Call, answer: Answer, attempt: int, *, last: bool) -> None:
        asked = read_retry_after(answer.headers.get("retry-after"), self.clock.now())
        where = self._where(call.method, call.path)
        error = read_refusal(answer, where, retry_after=asked, attempts=attempt)
        passing = answer.status in PASSING and error.kind in ("limited", "server", "invalid")
        refused = answer.headers.get("x-should-retry") == "false"
        too_long = asked is not None and asked > self._policy.longest_asked
        safe = call.repeatable or answer.status == 429  # a request that was turned away has changed nothing
        if asked is not None and answer.status == 429 and not too_long:
            self._pace.hold_back(asked)
        if last or not passing or refused or too_long or not safe:
            raise error
        await self.clock.sleep(self._policy.draw_wait(attempt, self._random) if asked is None else asked)

    def _revealed(self) -> dict[str, str]:
        return {k: v.reveal() if isinstance(v, Secret) else v for k, v in self._headers().items()}

    def _document(self, answer: Answer, path: str) -> Any:
        if answer.status == 204:
            return None
        where = self._where("the answer to", path)
        if not answer.is_json:
            raise unreadable_answer(answer, where)
        if isinstance(answer.body, dict) and set(answer.body) == {"error"}:
            raise read_refusal(attrs.evolve(answer, status=400), where, retry_after=None, attempts=1)
        return answer.body

    def _where(self, method: str, path: str) -> str:
        return f"{self.service}: {method} {urlsplit(path).path}"


class _Translated:
    """A context that turns the library's errors into ours: not sent (`network`), or perhaps carried out (`lost`)."""

    def __init__(self, where: str, address: str = "") -> None:
        self._where, self._address = where, address

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, httpx.InvalidURL):
            raise ProviderError("invalid", "this is not a valid address", where=self._where) from None
        if isinstance(error, httpx.DecodingError):
            raise ProviderError("protocol", "the answer cannot be decompressed", where=self._where) from None
        if isinstance(error, httpx.HTTPError):
            sent = "network" if isinstance(error, UNSENT) else "lost"
            description = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            place = f" ({redact_link(self._address)})" if self._address else ""
            raise ProviderError(sent, f"{description}{place}", where=self._where) from None


@cache
def _trusted_authorities(*_: str | None) -> ssl.SSLContext:
    """Return the trusted certificates, cached by the variables that name them: reading them takes 70 ms."""
    return httpx.create_ssl_context()


def check_address(address: str, where: str) -> None:
    """Raise `insecure-url` for an address that would send a key in clear text, or that contains a password."""
    parts = urlsplit(address)
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK):
        if parts.username or parts.password:
            raise LuthierError("insecure-url", "an address must not contain a user or password", where=where)
        return
    raise LuthierError("insecure-url", "only https, or http on this machine", where=where, found=redact_link(address))


async def _read_answer(answer: httpx.Response) -> Answer:
    await answer.aread()
    headers = {name.lower(): value for name, value in answer.headers.items()}
    try:
        return Answer(status=answer.status_code, headers=headers, body=answer.json() if answer.content else {})
    except (ValueError, RecursionError):
        return Answer(status=answer.status_code, headers=headers, body=answer.text[:500], is_json=False)
