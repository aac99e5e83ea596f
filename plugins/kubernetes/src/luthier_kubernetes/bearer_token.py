"""The token of a cluster's user. It is read at its first use, and again when it has ended or was refused."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
from luthier import LuthierError, Secret, read_time

EARLY: Final = 10.0  # a token is read again so many seconds before its end
Headers = Mapping[str, str | Secret]


@attrs.frozen(kw_only=True)
class Token:
    """A token, and its end in seconds since 1970, or None if it is not known."""

    secret: Secret
    ends: float | None = None


class BearerToken:
    """The header with the token that `read` returns. `now` returns the time in seconds since 1970."""

    def __init__(self, read: Callable[[], Token], now: Callable[[], float]) -> None:
        self._read, self._now = read, now
        self._token: Token | None = None

    def headers(self) -> Headers:
        """Return the header with a token that has not ended."""
        token = self._token
        if token is None or (token.ends is not None and self._now() >= token.ends - EARLY):
            token = self._token = self._read()
        return {"authorization": token.secret.with_prefix("Bearer ")}

    def forget(self) -> None:
        """Read the token again before the next request."""
        self._token = None


def run_exec(command: Mapping[str, Any], where: str) -> Token:
    """Return the token that the `exec` command of a kubeconfig writes as an ExecCredential, with its end."""
    words = [str(command.get("command")), *map(str, command.get("args") or [])]
    given = {str(item["name"]): str(item["value"]) for item in command.get("env") or []}
    version = str(command.get("apiVersion", "client.authentication.k8s.io/v1"))
    asked = {"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": False}}
    environ = {**os.environ, **given, "KUBERNETES_EXEC_INFO": json.dumps(asked)}
    try:
        done = subprocess.run(words, capture_output=True, check=True, timeout=60, env=environ)
        status = json.loads(done.stdout)["status"]
        return Token(secret=Secret(status["token"]), ends=read_time(status.get("expirationTimestamp")))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError, AttributeError):
        problem = f"the command {words[0]!r} gave no token"
        remedy = "Run it by hand: it must exit with 0 and write an ExecCredential with status.token."
        raise LuthierError("credential-missing", problem, where=where, remedy=remedy) from None
