"""How requests prove who asks, where one header for all is not enough: by a signature, or by a key that ends."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Final, Protocol

import httpx

UNKNOWN: Final = 401  # the status of an answer that does not know the key


class Signer(Protocol):
    """Signs requests with a key that is not sent itself."""

    def __call__(self, method: str, link: str, headers: Mapping[str, str], body: bytes) -> Mapping[str, str]:
        """Return the headers that the request must have besides; `link` and `headers` are as they will be sent."""


class SignedRequests(httpx.Auth):
    """Adds the headers of a signer to every request."""

    requires_request_body = True

    def __init__(self, signer: Signer) -> None:
        self._signer = signer

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers.update(self._signer(request.method, str(request.url), request.headers, request.content))
        yield request


class RenewedKeys(httpx.Auth):
    """Sends a request once more with another key, where the service does not know its first one.

    Such a request was turned away before anything was done, so a change may be sent again too. A body that is read
    from a file cannot be, and a key that is still the same after `renew` is not tried twice.
    """

    def __init__(self, headers: Callable[[], Mapping[str, str]], renew: Callable[[], None]) -> None:
        self._headers, self._renew = headers, renew

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        answer = yield request
        if answer.status_code != UNKNOWN or not isinstance(request.stream, httpx.ByteStream):
            return
        if self._replace_key(request):  # a request that ran beside this one has renewed it
            yield request
            return
        self._renew()
        if self._replace_key(request):
            yield request

    def _replace_key(self, request: httpx.Request) -> bool:
        """Put today's headers into the request, and return True if they are others than those it was sent with."""
        fresh = self._headers()
        changed = any(request.headers.get(name) != value for name, value in fresh.items())
        request.headers.update(fresh)
        return changed
