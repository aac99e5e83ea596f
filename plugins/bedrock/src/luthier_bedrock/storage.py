"""Send, find, list and fetch S3 objects by links that are signed here, so that no request contains a key."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

import attrs
from luthier import DataFile, ProviderError, ServiceClient, Wanted, download_file

from luthier_bedrock.signing import Keys

CHECKSUM: Final = "x-amz-checksum-sha256"
PAGES: Final = 100  # of a listing, 1,000 objects each


@attrs.frozen(kw_only=True)
class StoredObject:
    """An object of a bucket."""

    uri: str
    size: int


@attrs.frozen(kw_only=True)
class Storage:
    """S3 with given credentials. If `address` is None, the address of each bucket is used."""

    client: ServiceClient
    keys: Keys
    address: str | None

    async def send_file(self, uri: str, file: DataFile, progress: Any) -> None:
        """Write a file as an object. S3 checks its checksum."""
        headers = {CHECKSUM: base64.b64encode(bytes.fromhex(file.sha256)).decode()}
        link = self.keys.sign_link("PUT", self._link(uri), headers)
        await self.client.put_file(link, file.path, progress=progress, headers=headers)

    async def has_object(self, uri: str) -> bool:
        """Return True if an object exists and may be read."""
        try:
            async with self.client.open_stream(self._signed(uri), bare=True):
                return True
        except ProviderError as error:
            if error.kind in ("not_found", "permission"):
                return False
            raise

    async def read_text(self, uri: str) -> str:
        """Return the text of a small object."""
        async with self.client.open_stream(self._signed(uri), bare=True) as opened:
            return b"".join([block async for block in opened.blocks()]).decode("utf-8", "replace")

    async def fetch_file(self, uri: str, target: Path, progress: Any) -> None:
        """Download an object."""

        async def renew() -> str:
            return self._signed(uri)

        await download_file(self.client, Wanted(address=await renew(), bare=True, renew=renew), target, progress)

    async def list_objects(self, folder: str) -> AsyncIterator[StoredObject]:
        """Yield the objects below a folder."""
        bucket, prefix = split_uri(folder)
        asked = {"list-type": "2", "prefix": prefix}
        for _ in range(PAGES):
            link = self._link(f"s3://{bucket}/") + "?" + urlencode(sorted(asked.items()), quote_via=quote)
            async with self.client.open_stream(self.keys.sign_link("GET", link, {}), bare=True) as opened:
                page = _parse_page(b"".join([block async for block in opened.blocks()]))
            for item in page.iterfind("{*}Contents"):
                size = int(item.findtext("{*}Size") or 0)
                yield StoredObject(uri=f"s3://{bucket}/{item.findtext('{*}Key')}", size=size)
            following = page.findtext("{*}NextContinuationToken")
            if not following:
                return
            asked["continuation-token"] = following

    def _signed(self, uri: str) -> str:
        return self.keys.sign_link("GET", self._link(uri), {})

    def _link(self, uri: str) -> str:
        bucket, key = split_uri(uri)
        if self.address is not None:
            return f"{self.address.rstrip('/')}/{bucket}/{quote(key, safe='/~')}"
        if "." in bucket:  # the certificate of S3 does not cover such a bucket name
            return f"https://s3.{self.keys.region}.amazonaws.com/{bucket}/{quote(key, safe='/~')}"
        return f"https://{bucket}.s3.{self.keys.region}.amazonaws.com/{quote(key, safe='/~')}"


def split_uri(uri: str) -> tuple[str, str]:
    """Return bucket and key of an s3:// address."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _parse_page(body: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(body)
    except ElementTree.ParseError:
        raise ProviderError("protocol", "the list of objects cannot be read", where="bedrock: S3") from None
