"""Google's access tokens: a given one, or those of the default credentials, renewed before they expire."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import google.auth
import google.auth.transport.requests
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from luthier import LuthierError, ProviderError, Secret, read_secret

SCOPE: Final = "https://www.googleapis.com/auth/cloud-platform"


class AccessToken:
    """The token in requests. If `reference` is None, Google's application default credentials provide it."""

    def __init__(self, reference: str | None) -> None:
        self._reference = reference
        self._credentials: Any = None
        self._token: Secret | None = None

    async def refresh(self) -> None:
        """Make sure that the token is valid. This may ask Google for one, in a thread."""
        if self._reference is None:
            self._token = Secret(await asyncio.to_thread(self._renew))
        elif self._token is None:
            self._token = read_secret(self._reference, "vertex.access_token")

    def headers(self) -> Mapping[str, str | Secret]:
        """Return the header that identifies the user."""
        assert self._token is not None
        return {"authorization": self._token.with_prefix("Bearer ")}

    def _renew(self) -> str:
        try:
            if self._credentials is None:
                self._credentials = google.auth.default(scopes=[SCOPE])[0]
            credentials = self._credentials
            if not credentials.valid:
                credentials.refresh(google.auth.transport.requests.Request())
        except DefaultCredentialsError:
            remedy = "Run: gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS."
            raise LuthierError("credential-missing", "no Google credentials were found", where="vertex",
                               remedy=remedy) from None  # fmt: skip
        except GoogleAuthError as error:
            raise ProviderError("auth", str(error), where="vertex: a token of Google") from None
        return str(credentials.token)
