"""Files by address (s3://, gs://, hf://, https://, ...): found through fsspec, and read like local files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Final, cast
from urllib.parse import urlsplit

import attrs

from luthier.data.read.row import unreadable_row
from luthier.errors import LuthierError

ADDRESS: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+)://")
EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
TELLING: Final = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "generation", "md5Hash", "blob_id")
BUFFER: Final = 1 << 20  # bytes that are read at once


@attrs.frozen(kw_only=True)
class RemoteFile:
    """A file of one of fsspec's file systems, which is read like a `pathlib.Path`."""

    address: str  # without query and user, which may contain a key
    place: str  # the path in its file system
    system: Any = attrs.field(eq=False, repr=False)

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self.address).path).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    def is_dir(self) -> bool:
        """Return False, because folders are refused when files are looked up."""
        return False

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file's bytes. Every error that fsspec raises meanwhile becomes an OSError."""
        raw = _asked(lambda: self.system.open(self.place, mode), self.address)
        return cast(BinaryIO, io.BufferedReader(_Guarded(raw), BUFFER))

    @property
    def mark(self) -> list[str]:
        """Return what distinguishes the file without reading it: name, size, and what its file system says of it."""
        info = _asked(lambda: self.system.info(self.place), self.address)
        return [self.name, *(f"{key}={info[key]}" for key in TELLING if info.get(key) is not None)]


class _Guarded(io.RawIOBase):
    """A stream of another library, of which every failure becomes an OSError."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._raw.seekable())

    def readinto(self, buffer: Any) -> int:
        content = self._guarded(lambda: self._raw.read(len(buffer)))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._guarded(lambda: self._raw.seek(offset, whence)))

    def tell(self) -> int:
        return int(self._raw.tell())

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _guarded(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except OSError:
            raise
        except Exception as error:  # fsspec's implementations have no common class of errors
            raise OSError(str(error) or type(error).__name__) from error


def is_address(path: str) -> bool:
    """Return True if a path names a file of another system than this machine's own."""
    match = ADDRESS.match(path)
    return match is not None and match[1].lower() != "file"


def find_remote(address: str) -> list[RemoteFile]:
    """Return the files of an address or of a glob, sorted. Raises `data-not-found` if there is none."""
    system, place = _open_system(address)
    web = address.lower().startswith("http")
    if any(mark in address for mark in ("*", "[") if not (web and mark == "[")):
        places = sorted(_asked(lambda: system.glob(place), address))
        files = [_remote(_whole(place, address), place, system) for place in places]
    elif not web and _asked(lambda: system.isdir(place), address):
        problem, remedy = "this is a folder", "Name files, or a glob such as folder/*.jsonl."
        raise unreadable_row(_shown(address), problem, remedy=remedy)
    else:
        files = [_remote(address, place, system)] if _asked(lambda: system.exists(place), address) else []
    if not files:
        raise LuthierError("data-not-found", "there is no such file", where=_shown(address))
    return files


def _open_system(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it."""
    scheme = address.partition("://")[0].lower()
    extra = EXTRAS.get(scheme, "local")
    try:
        import fsspec

        system, place = fsspec.core.url_to_fs(address)
    except ImportError as error:
        problem = f"files of {scheme}:// need a library that is not installed: {error}"
        remedy = f'Run: pip install "luthier[{extra}]"' if scheme in EXTRAS else "Install the library that is named."
        raise LuthierError("dependency-missing", problem, where=_shown(address), remedy=remedy) from None
    except Exception as error:  # whatever a file system raises when it is made: about keys, regions, unknown names
        raise unreadable_row(_shown(address), f"the address cannot be opened: {error}") from None
    return system, place


def _asked(ask: Callable[[], Any], address: str) -> Any:
    """Return a file system's answer. What it raises becomes `data-not-found` with the address."""
    try:
        return ask()
    except FileNotFoundError:
        raise LuthierError("data-not-found", "there is no such file", where=_shown(address)) from None
    except Exception as error:  # fsspec's implementations have no common class of errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem, remedy = f"the file cannot be reached: {reason}", "Check the address, the network and your keys."
        raise LuthierError("data-not-found", problem, where=_shown(address), remedy=remedy) from None


def _remote(address: str, place: str, system: Any) -> RemoteFile:
    return RemoteFile(address=_shown(address), place=place, system=system)


def _whole(place: str, like: str) -> str:
    """Return the address of a path in the file system of another address."""
    return place if "://" in place else f"{like.partition('://')[0]}://{place.lstrip('/')}"


def _shown(address: str) -> str:
    """Return the address without the parts that may be secret."""
    scheme, _, rest = address.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
