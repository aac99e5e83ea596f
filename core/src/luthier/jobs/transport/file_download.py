"""Downloads: written to a partial file, resumed after a cut, checked, and only then given their name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

import attrs

from luthier.errors import LuthierError
from luthier.jobs.provider_error import ProviderError
from luthier.jobs.transport.file_hash import hash_file
from luthier.jobs.transport.service_client import Opened, ServiceClient
from luthier.plugins.providing.job_records import Progress

TRIES: Final = 6
RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@attrs.frozen(kw_only=True)
class Wanted:
    """A file to fetch: a path of the service, or with `bare` a signed link.

    `size` and `sha256` are None if not known.
    """

    address: str
    params: Any = None
    bare: bool = False
    size: int | None = None
    sha256: str | None = None
    renew: Callable[[], Any] | None = None  # async: returns a fresh signed link after the old one has expired


async def download_file(
    client: ServiceClient, wanted: Wanted, target: Path, progress: Progress | None = None
) -> Mapping[str, str]:
    """Fetch a file to `target` and return the answer's headers. `target` exists only once all of it has come."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    tag: str | None = None
    for attempt in range(1, TRIES + 1):
        try:
            headers, tag = await _fetch_rest(client, wanted, partial, tag, progress)
            break
        except ProviderError as error:
            if error.http_status == 403 and wanted.bare and wanted.renew is not None:
                wanted = attrs.evolve(wanted, address=await wanted.renew())
            elif not error.is_passing or error.kind == "limited" or attempt == TRIES:
                raise
            else:
                await client.clock.sleep(min(0.5 * 2 ** (attempt - 1), 10.0))
    else:
        raise ProviderError("lost", "the download broke off every time", where=str(target), attempts=TRIES)
    _check_whole(wanted, partial)
    os.replace(partial, target)
    return headers


def place_inside(folder: Path, name: str) -> Path:
    """Return the path in `folder` of a file that a service names.

    Raises `archive-unsafe` if the name leads out of it.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise LuthierError("archive-unsafe", "a file's name leads out of the folder", where=str(folder), found=name)
    return folder.joinpath(*parts.parts)


async def _fetch_rest(
    client: ServiceClient, wanted: Wanted, partial: Path, tag: str | None, progress: Progress | None
) -> tuple[Mapping[str, str], str | None]:
    """Append what is missing. Begin again if the service does not resume, or has another file now."""
    have = partial.stat().st_size if partial.exists() else 0
    asked = {"range": f"bytes={have}-"} if have else {}
    if have and tag:
        asked["if-range"] = tag
    async with client.open_stream(
        wanted.address, params=wanted.params, headers={**asked, "accept-encoding": "identity"}, bare=wanted.bare
    ) as opened:
        if 300 <= opened.status < 400:
            onward = attrs.evolve(wanted, address=opened.headers.get("location", ""), params=None, bare=True)
            return await _fetch_rest(client, onward, partial, tag, progress)
        begin, total = _place(opened, have)
        written = begin
        try:
            with partial.open("r+b" if begin else "wb") as file:
                file.seek(begin)
                async for block in opened.blocks():
                    file.write(block)
                    written += len(block)
                    if progress is not None:
                        progress(written, total or written)
                file.truncate()
        except OSError as error:
            raise LuthierError("disk-full", error.strerror or "cannot be written", where=str(partial)) from None
        if total is not None and written != total:
            raise ProviderError("lost", f"only {written} of {total} bytes came", where=str(partial))
        return opened.headers, opened.headers.get("etag")


def _place(opened: Opened, have: int) -> tuple[int, int | None]:
    """Return where the body begins in the file, and how long the file is; None if the service does not say."""
    match = RANGE.fullmatch(opened.headers.get("content-range", ""))
    if opened.status == 206 and match and int(match[1]) == have:
        return have, None if match[2] == "*" else int(match[2])
    length = opened.headers.get("content-length")
    return 0, int(length) if length and length.isdigit() else None


def _check_whole(wanted: Wanted, partial: Path) -> None:
    size = partial.stat().st_size
    if wanted.size is not None and size != wanted.size:
        partial.unlink()
        raise LuthierError("download-damaged", f"it should have {wanted.size} bytes", where=partial.stem, found=size)
    if wanted.sha256 is not None and hash_file(partial) != wanted.sha256.lower():
        partial.unlink()
        raise LuthierError("download-damaged", "the checksum is wrong", where=partial.stem)
