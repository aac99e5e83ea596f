"""AWS credentials and the signatures made with them. botocore finds the credentials and signs."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any, Final

from botocore.auth import S3SigV4QueryAuth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials, ReadOnlyCredentials
from botocore.exceptions import BotoCoreError
from botocore.session import Session
from luthier import LuthierError, ProviderError, Secret, read_secret

from luthier_bedrock import Bedrock

LASTING: Final = 3600  # seconds for which a signed link is valid
SIGNED: Final = ("host", "content-type")
if logging.getLogger("botocore").level == logging.NOTSET:
    logging.getLogger("botocore").setLevel(logging.WARNING)  # at DEBUG it writes session tokens, and answers with keys


class Keys:
    """The credentials that sign requests. They are read at their first use."""

    def __init__(self, options: Bedrock) -> None:
        self.options = options
        self._session: Session | None = None
        self._source: Credentials | None = None
        self._held: ReadOnlyCredentials | None = None

    @property
    def given_region(self) -> str | None:
        """Return the region of the options, the environment or the profile, or None if none names one."""
        region = self.options.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return region or self._configured("region") or None

    @property
    def region(self) -> str:
        """Return the region. Raises `credential-missing` if none is named."""
        region = self.given_region
        if region is None:
            remedy = "Set provider.region, or run: export AWS_REGION=..."
            raise LuthierError("credential-missing", "no region is named", where="bedrock.region", remedy=remedy)
        return region

    async def refresh(self) -> None:
        """Read the keys, or renew them shortly before they expire. This may ask AWS, in a thread."""
        self._held = credentials = await asyncio.to_thread(self._read)
        for value in (credentials.secret_key, credentials.token):
            if value:
                Secret(value)  # from now on every output masks it

    def sign(self, method: str, link: str, headers: Mapping[str, str], body: bytes) -> Mapping[str, str]:
        """Return the headers that sign a request to Bedrock."""
        named = {name: headers[name] for name in SIGNED if name in headers}
        request = AWSRequest(method=method, url=link, data=body, headers=named)
        SigV4Auth(self._held, "bedrock", self.region).add_auth(request)
        return {name: value for name, value in request.headers.items() if name.lower() not in SIGNED}

    def sign_link(self, method: str, link: str, headers: Mapping[str, str]) -> str:
        """Return a link to an S3 object that needs no key for an hour. `headers` must be sent with it."""
        request = AWSRequest(method=method, url=link, headers=dict(headers))
        S3SigV4QueryAuth(self._held, "s3", self.region, LASTING).add_auth(request)
        return str(request.url)

    def _read(self) -> ReadOnlyCredentials:
        assert self.region  # missing options are reported before
        if self._source is None:
            self._source = self._find()
        try:
            return self._source.get_frozen_credentials()
        except BotoCoreError as error:
            raise ProviderError("auth", str(error), where="bedrock: the keys of AWS") from None

    def _find(self) -> Credentials:
        options = self.options
        if options.access_key_id is not None:
            token = options.session_token
            return Credentials(
                options.access_key_id,
                read_secret(options.secret_access_key, "bedrock.secret_access_key").reveal(),
                None if token is None else read_secret(token, "bedrock.session_token").reveal(),
            )
        credentials = self._configured("credentials")
        if credentials is None:
            remedy = "Run: aws configure, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            raise LuthierError("credential-missing", "no AWS credentials were found", where="bedrock", remedy=remedy)
        return credentials

    def _configured(self, what: str) -> Any:
        """Return the `region` or the `credentials` that botocore finds, or None."""
        try:
            if self._session is None:
                self._session = Session(profile=self.options.profile)
            session = self._session
            return session.get_credentials() if what == "credentials" else session.get_config_variable(what)
        except BotoCoreError as error:
            raise LuthierError("credential-missing", str(error), where="bedrock.profile") from None
