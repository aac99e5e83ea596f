"""The API server of SkyPilot: each call is a request of its own, whose result is asked for by its id."""

from __future__ import annotations

import getpass
import hashlib
import json
import platform
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from luthier import Call, ProviderError, Secret, ServiceClient, read_secret

from luthier_skypilot import Skypilot
from luthier_skypilot.managed_job import COLORS

VERSION: Final = "62"  # of the API: that of SkyPilot 0.14.1
REQUEST: Final = "x-skypilot-request-id"
KINDS: Final = {  # names of SkyPilot's exceptions
    "ClusterNotUpError": "not_found", "ClusterDoesNotExist": "not_found", "ResourcesUnavailableError": "unsupported",
    "ResourcesMismatchError": "invalid", "NotSupportedError": "unsupported", "NoCloudAccessError": "permission",
    "PermissionDeniedError": "permission", "InvalidSkyPilotConfigError": "invalid", "ValueError": "invalid",
    "InvalidClusterNameError": "invalid", "StorageError": "invalid", "UserRequestRejectedByPolicy": "permission",
}  # fmt: skip


class SkypilotServer:
    """One API server, spoken to in JSON. What it packs as Python objects is never unpacked."""

    def __init__(self, options: Skypilot) -> None:
        self.client = ServiceClient(options.address, service="skypilot", headers=_headers_of(options))

    async def read(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the result of a request that only reads. It is repeated while the server fails in passing."""
        return await self.result(await self.begin(path, body, repeatable=True))

    async def begin(self, path: str, body: Mapping[str, Any], *, repeatable: bool) -> str:
        """Begin a request, and return its id."""
        given = {"env_vars": _user_variables(), **body}
        answer = await self.client.send_call(Call(method="POST", path=path, json=given, repeatable=repeatable))
        id = answer.headers.get(REQUEST)
        if not id or not answer.is_json:
            raise ProviderError("protocol", "the answer names no request", where=f"skypilot: POST {path}")
        return id

    async def result(self, id: str) -> Any:
        """Return the result of a request, when it has ended. Raises the error with which it ended."""
        answer = await self.client.send_call(
            Call(method="GET", path="/api/get", params={"request_id": id}, accepted=(200, 500))
        )
        payload = answer.body
        if answer.status == 500:
            payload = payload.get("detail") if isinstance(payload, dict) else None
            if not isinstance(payload, dict):  # a failure of the server itself
                payload = await self.client.read_json("/api/get", {"request_id": id})
        return _read_payload(payload)

    async def active_requests(self) -> list[tuple[str, str, Mapping[str, Any]]]:
        """Return the requests that have not ended: the id, the name and the body of each."""
        items = await self.client.read_json("/api/status")
        if not isinstance(items, list):
            raise ProviderError("protocol", "the answer is no list of requests", where="skypilot: GET /api/status")
        return [(str(i["request_id"]), str(i["name"]), json.loads(i["request_body"]) or {}) for i in items]

    async def read_text(self, path: str, *, params: Any = None, body: Any = None) -> str:
        """Return a whole body of text, by a GET or, with `body`, by a POST that only reads."""
        given = None if body is None else {"env_vars": _user_variables(), **body}
        whole = b""
        async with self.client.open_stream(
            path, params=params, post=given, headers={"accept-encoding": "identity"}
        ) as opened:
            async for block in opened.blocks():
                whole += block
        return whole.decode("utf-8", "replace")

    async def close(self) -> None:
        await self.client.close()


def _read_payload(payload: Any) -> Any:
    """Return the value in a request's record, or raise its error."""
    try:
        error = json.loads(payload["error"]) if payload.get("error") else None
        if not error:
            return json.loads(payload["return_value"]) if payload.get("return_value") else None
        kind, message = str(error["type"]), str(error["message"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ProviderError("protocol", "the answer is no request of SkyPilot", where="skypilot") from None
    where = f"skypilot: {payload.get('name')}"
    raise ProviderError(KINDS.get(kind, "server"), COLORS.sub("", message), where=where, provider_code=kind)


@cache
def _user_variables() -> dict[str, str]:
    """Return the variables by which the server knows the user of this machine: a name, and eight hexadecimal digits."""
    user = getpass.getuser()
    digits = hashlib.sha256(f"{user}@{platform.node()}".encode()).hexdigest()[:8]
    return {"SKYPILOT_USER_ID": digits, "SKYPILOT_USER": user}


def _headers_of(options: Skypilot) -> Any:
    reference = options.token

    @cache
    def headers() -> dict[str, str | Secret]:
        named: dict[str, str | Secret] = {"x-skypilot-api-version": VERSION, "x-skypilot-version": "0.14.1"}
        if reference is not None:
            named["authorization"] = read_secret(reference, "skypilot.token").with_prefix("Bearer ")
        return named

    return headers
