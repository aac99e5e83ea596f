"""Errors of providers, by kind, so that callers know what is safe to do next."""

from __future__ import annotations

from typing import Final

from luthier.errors import LuthierError
from luthier.jobs.secret import redact_text

CODES: Final = {
    "auth": "provider-auth",
    "permission": "provider-auth",
    "quota": "provider-quota",
    "limited": "provider-limited",
    "invalid": "provider-invalid",
    "unsupported": "provider-unsupported",
    "not_found": "provider-not-found",
    "exists": "provider-exists",
    "ended": "provider-ended",
    "server": "provider-failed",
    "network": "provider-unreachable",
    "lost": "provider-lost",
    "protocol": "provider-protocol",
}
PASSING: Final = ("limited", "server", "network", "lost", "protocol")  # kinds after which a later attempt may succeed
UNDECIDED: Final = ("server", "lost", "protocol", "exists")  # kinds after which a created job may exist


class ProviderError(LuthierError):
    """A failure of a service: it refused, failed or could not be reached. `kind` is a key of `CODES`.

    `lost` means that no answer came, although the request may have been carried out; `network` that it was not sent.
    `retry_after` is in seconds; None if the service names no time.
    """

    def __init__(
        self,
        kind: str,
        problem: str,
        *,
        where: str | None = None,
        found: object = None,
        remedy: str | None = None,
        http_status: int | None = None,
        provider_code: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        attempts: int = 1,
    ) -> None:
        self.kind, self.http_status, self.provider_code = kind, http_status, provider_code
        self.request_id, self.retry_after, self.attempts = request_id, retry_after, attempts
        facts = [f"HTTP {http_status}" if http_status else "", f"code {provider_code}" if provider_code else ""]
        facts += [f"request {request_id}" if request_id else "", f"{attempts} attempts" if attempts > 1 else ""]
        details = ", ".join(fact for fact in facts if fact)
        text = redact_text(f"{problem.strip().rstrip('.')} ({details})" if details else problem)
        super().__init__(CODES[kind], text, where=where, found=found, remedy=remedy)

    @property
    def is_passing(self) -> bool:
        """Return True if the same request may succeed later."""
        return self.kind in PASSING

    @property
    def may_have_created(self) -> bool:
        """Return True if a `submit` that met this error may have created its job."""
        return self.kind in UNDECIDED
