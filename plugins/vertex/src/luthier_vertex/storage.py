"""Send, find, list and fetch objects of Cloud Storage."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from luthier import Call, DataFile, ProviderError, ServiceClient, Wanted, download_file, read_pages


async def send_object(client: ServiceClient, uri: str, file: DataFile, progress: Any) -> None:
    """Write a file as an object, by an upload link that needs no token. The service checks the MD5."""
    bucket, name = split_uri(uri)
    meta = {"name": name, "md5Hash": _md5(file.path), "contentType": "application/jsonl"}
    path, params = f"/upload/storage/v1/b/{quote(bucket, safe='')}/o", {"uploadType": "resumable"}
    answer = await client.send_call(Call(method="POST", path=path, params=params, json=meta))
    link = answer.headers.get("location")
    if not link:
        raise ProviderError("protocol", "the answer has no upload link", where=f"vertex: {uri}")
    await client.put_file(link, file.path, progress=progress)


async def has_object(client: ServiceClient, uri: str) -> bool:
    """Return True if an object exists and may be read."""
    try:
        await client.read_json(_path(uri))
    except ProviderError as error:
        if error.kind == "not_found":
            return False
        raise
    return True


async def list_objects(client: ServiceClient, folder: str) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the objects below a folder, each with `name` and `size`."""
    bucket, prefix = split_uri(folder.rstrip("/") + "/")
    async for item in read_pages(
        client, f"/storage/v1/b/{quote(bucket, safe='')}/o", "items", params={"prefix": prefix}
    ):
        yield item


async def fetch_object(client: ServiceClient, uri: str, target: Path, progress: Any) -> None:
    """Download an object."""
    await download_file(client, Wanted(address=_path(uri), params={"alt": "media"}), target, progress)


def split_uri(uri: str) -> tuple[str, str]:
    """Return bucket and name of a gs:// address."""
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    return bucket, name


def _path(uri: str) -> str:
    bucket, name = split_uri(uri)
    return f"/storage/v1/b/{quote(bucket, safe='')}/o/{quote(name, safe='')}"


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return base64.b64encode(digest.digest()).decode()
