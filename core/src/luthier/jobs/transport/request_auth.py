"""Authentication of requests for which one constant header is not enough: by a signature, or by a key that expires."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Final, Protocol

import httpx

UNKNOWN: Final = 401  # the HTTP status of an answer to an unknown or expired key


class Signer(Protocol):
    """A signer of requests, whose key is not sent itself."""

    def __call__(self, method: str, link: str, headers: Mapping[str, str], body: bytes) -> Mapping[str, str]:
        """Return the headers to add to the request; `link` and `headers` are as they will be sent."""


class SignedRequests(httpx.Auth):
    """An authentication that adds the headers of a signer to every request."""

    requires_request_body = True

    def __init__(self, signer: Signer) -> None:
        self._signer = signer

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers.update(self._signer(request.method, str(request.url), request.headers, request.content))
        yield request


class RenewedKeys(httpx.Auth):
    """An authentication that sends a request again with a new key if the service refuses the first one.

    The service has done nothing for a refused request, so even a change may be sent again. A body that is read from a
    file cannot be sent again, and a key that is still the same after `renew` is not tried twice.
    """

    def __init__(self, headers: Callable[[], Mapping[str, str]], renew: Callable[[], None]) -> None:
        self._headers, self._renew = headers, renew

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        answer = yield request
        if answer.status_code != UNKNOWN or not isinstance(request.stream, httpx.ByteStream):
            return
        if self._replace_key(request):  # a request that ran at the same time has renewed the key
            yield request
            return
        self._renew()
        if self._replace_key(request):
            yield request

    def _replace_key(self, request: httpx.Request) -> bool:
        """Put the current headers into the request; return True if they differ from those it was sent with."""
        fresh = self._headers()
        changed = any(request.headers.get(name) != value for name, value in fresh.items())
        request.headers.update(fresh)
        return changed
