"""Anyscale's SDK, called in threads: it is imported at the first call, and its errors become ours."""

from __future__ import annotations

import asyncio
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

from luthier import LuthierError, ProviderError, check_address, current_clock, read_refused, read_secret

PLACE: Final = "anyscale-jobs"
LONGEST: Final = 300.0  # seconds: the SDK sets no limit to a request
WAITS: Final = (1.0, 4.0, 16.0)  # seconds before a failed reading is repeated
OWN_WAITS: Final = "ANYSCALE_DISABLE_RATE_LIMIT_RETRIES"  # the SDK's own switch: a busy service is waited for here
UNSENT: Final = ("NewConnectionError", "ConnectTimeoutError", "NameResolutionError")  # urllib3's: nothing was sent
T = TypeVar("T")


class SdkAccount:
    """One user of Anyscale, as its SDK sees it."""

    def __init__(self, address: str, reference: str) -> None:
        self.address, self._reference = address.rstrip("/"), reference
        self._sdk: Any = None
        self._lock = threading.Lock()  # the SDK's caches are not for several threads

    async def change(self, act: Callable[[Any], T]) -> T:
        """Return what `act` returns, given the SDK's jobs. It is called once."""
        check_address(self.address, f"{PLACE}.address")
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._act, act), LONGEST)
        except TimeoutError:
            raise ProviderError("lost", f"no answer came within {LONGEST:.0f} seconds", where=PLACE) from None

    async def read(self, act: Callable[[Any], T]) -> T:
        """Return what `act` returns. It only reads, so it is repeated while the service fails in passing."""
        for wait in (*WAITS, None):
            try:
                return await self.change(act)
            except ProviderError as error:
                if wait is None or not error.is_passing or error.kind == "protocol":
                    raise
                await current_clock().sleep(wait if error.retry_after is None else error.retry_after)
        raise AssertionError("the last attempt returns or raises")

    def _act(self, act: Callable[[Any], T]) -> T:
        with self._lock:
            try:
                if self._sdk is None:
                    self._sdk = self._open_sdk()
                return act(self._sdk.job)
            except LuthierError:
                raise
            except Exception as error:
                raise _read_error(error) from None

    def _open_sdk(self) -> Any:
        """Return the SDK for this user, which asks at once whether the key is good."""
        os.environ.setdefault(OWN_WAITS, "1")
        key = read_secret(self._reference, f"{PLACE}.api_key").reveal()
        return _import_sdk().Anyscale(auth_token=key, _host=self.address)


def _import_sdk() -> Any:
    try:
        return importlib.import_module("anyscale")
    except ImportError as error:
        remedy = "Run: pip install 'luthier-anyscale[jobs]'"
        problem = f"Anyscale's SDK cannot be imported: {error}"
        raise LuthierError("dependency-missing", problem, where=PLACE, remedy=remedy) from None


def _read_error(error: BaseException) -> ProviderError:
    """Return the error that an exception of the SDK means, by the answer or the connection beneath it."""
    causes = list(_list_causes(error))
    for cause in causes:
        status = getattr(cause, "status", None)
        if isinstance(status, int) and status:
            headers = {str(k).lower(): str(v) for k, v in dict(getattr(cause, "headers", None) or {}).items()}
            return read_refused(status, headers, getattr(cause, "body", None), PLACE)
    names = {type(cause).__name__ for cause in causes}
    text = str(error).strip() or type(error).__name__
    if any(type(cause).__module__.startswith(("urllib3", "requests")) for cause in causes):
        return ProviderError("network" if names.intersection(UNSENT) else "lost", text, where=PLACE)
    if isinstance(error, RuntimeError) and text.endswith("was not found.") and len(causes) == 1:
        return ProviderError("not_found", text, where=PLACE)
    if "ClickException" in {base.__name__ for base in type(error).__mro__} and "credentials" in text:
        return ProviderError("auth", text, where=PLACE)
    expected = isinstance(error, (ValueError, TypeError, RuntimeError)) and len(causes) == 1
    refused = expected and not text.startswith("Invalid value for `")  # a model that lacks what an answer must have
    return ProviderError("invalid" if refused else "protocol", f"{type(error).__name__}: {text}", where=PLACE)


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, and those that were being handled when it was raised."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
