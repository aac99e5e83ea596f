"""The meaning of an unsuccessful answer: its kind, code and message, in whatever shape the service writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import attrs

from luthier.errors import show_value
from luthier.jobs.clock import current_clock
from luthier.jobs.provider_error import ProviderError
from luthier.jobs.secret import redact_text
from luthier.jobs.transport.retry_policy import read_retry_after

KINDS: Final = {
    400: "invalid",
    401: "auth",
    402: "quota",
    403: "permission",
    404: "not_found",
    405: "invalid",
    409: "exists",
    410: "ended",
    412: "quota",
    413: "invalid",
    422: "invalid",
    429: "limited",
}
# words in a code or type after which no wait helps
QUOTA: Final = ("quota", "billing", "credit", "payment", "balance", "spend")
# words in a code that mean "it exists already", whatever the status
EXISTS: Final = ("conflict", "alreadyexists", "already_exists", "resourceinuse")
REQUEST_IDS: Final = ("x-request-id", "x-amzn-requestid", "request-id", "cf-ray")
HINTS: Final = {
    "auth": "Check the key, and that it belongs to this service and project.",
    "permission": "Give the key's account the right to fine-tune this model.",
}


@attrs.frozen(kw_only=True)
class Answer:
    """An answer as it came: its status, headers by lower-case name, and body."""

    status: int
    headers: Mapping[str, str]
    body: Any  # parsed if it is JSON, else text
    is_json: bool = True

    @property
    def request_id(self) -> str | None:
        return next((self.headers[name] for name in REQUEST_IDS if name in self.headers), None)


def read_refusal(answer: Answer, where: str, *, retry_after: float | None, attempts: int) -> ProviderError:
    """Return the error that an answer with a status of 300 or above means."""
    code, message = read_message(answer.body)
    code = code or answer.headers.get("x-amzn-errortype", "").partition(":")[0] or None
    kind = KINDS.get(answer.status, "server" if answer.status >= 500 else "invalid")
    if 300 <= answer.status < 400:
        kind, message = "protocol", f"redirects to {redact_text(answer.headers.get('location', 'nowhere'))}"
    lowered = (code or "").lower()
    if kind in ("limited", "permission", "invalid") and any(word in lowered for word in QUOTA):
        kind = "quota"
    if kind == "invalid" and any(word in lowered for word in EXISTS):
        kind = "exists"
    return ProviderError(
        kind,
        message or f"the service answered {answer.status}",
        where=where,
        remedy=HINTS.get(kind),
        http_status=answer.status,
        provider_code=code,
        request_id=answer.request_id,
        retry_after=retry_after,
        attempts=attempts,
    )


def read_refused(status: int, headers: Mapping[str, str], body: str | bytes | None, where: str) -> ProviderError:
    """Return the error that an answer means which a vendor's SDK got. `headers` have names in lower case."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body or ""
    try:
        value, is_json = json.loads(text), True
    except (ValueError, RecursionError):
        value, is_json = text[:500], False
    asked = read_retry_after(headers.get("retry-after"), current_clock().now())
    answer = Answer(status=status, headers=headers, body=value, is_json=is_json)
    return read_refusal(answer, where, retry_after=asked, attempts=1)


def read_message(body: Any) -> tuple[str | None, str]:
    """Return the code and the message of an error's body: OpenAI's, Google's, AWS's, or plain text."""
    if isinstance(body, list) and body:
        body = body[0]
    if not isinstance(body, dict):
        return None, show_value(body, 300) if body else ""
    error = body.get("error")
    inner: dict[str, Any] = error if isinstance(error, dict) else body
    code = next((inner[k] for k in ("code", "status", "type", "__type") if inner.get(k) not in (None, "")), None)
    if isinstance(code, int) or inner.get("type") in ("insufficient_quota",):
        code = inner.get("status") or inner.get("type") or code
    message = next((inner[k] for k in ("message", "Message", "detail", "error") if isinstance(inner.get(k), str)), "")
    param = f" (field {inner['param']})" if isinstance(inner.get("param"), str) else ""
    return (None if code is None else str(code)), (message or show_value(inner, 300)) + param


def unreadable_answer(answer: Answer, where: str) -> ProviderError:
    """Return the error for a body that is not what the service promises."""
    return ProviderError(
        "protocol",
        f"the answer cannot be read: {redact_text(show_value(answer.body, 200))}",
        where=where,
        http_status=answer.status,
        request_id=answer.request_id,
    )
