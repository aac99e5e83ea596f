"""Secrets: where keys are read from, and how they are kept out of every text."""

from __future__ import annotations

import hmac
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import quote, quote_plus, urlsplit, urlunsplit

from luthier.errors import LuthierError

MASK: Final = "****"
SHORTEST: Final = 4  # characters: masking shorter values would mask ordinary words
SOURCES: Final = ("env:", "file:", "cmd:", "held:")
LINK: Final = re.compile(r"https?://[^\s\"'<>\\]+")
SIGNED: Final = re.compile(
    r"[?&](?:[^=&\s]*(?:signature|token|credential|expires|key|sig|secret)[^=&\s]*)=", re.IGNORECASE
)


class Secret:
    """A key that shows its text only through `reveal()`: it is not printed, copied, serialised or compared in clear."""

    __slots__ = ("_prefix", "_value")

    def __init__(self, value: str, prefix: str = "") -> None:
        if not isinstance(value, str) or not value.strip():
            raise LuthierError("credential-missing", "a key must be a text that is not empty")
        self._value, self._prefix = value.strip(), prefix
        _KNOWN.add(self._value)

    def reveal(self) -> str:
        """Return the key itself, behind its prefix."""
        return f"{self._prefix}{self._value}"

    def with_prefix(self, prefix: str) -> Secret:
        """Return the key with a prefix such as `Bearer `, as a header needs it."""
        return Secret(self._value, prefix)

    def __repr__(self) -> str:
        return MASK

    __str__ = __repr__

    def __format__(self, _: str) -> str:
        return MASK

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self.reveal().encode(), other.reveal().encode())

    def __hash__(self) -> int:
        return id(self)

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError("a secret is neither copied nor serialised")

    __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = __getstate__ = _refuse


_KNOWN: set[str] = set()  # every key of this process, to be masked in its texts
_HELD: dict[str, Secret] = {}


def hold_secret(value: str | Secret) -> str:
    """Keep a key in this process's memory, and return the reference `held:N` by which options name it."""
    secret = value if isinstance(value, Secret) else Secret(value)
    reference = f"held:{len(_HELD) + 1}"
    _HELD[reference] = secret
    return reference


def is_held_secret(reference: str) -> bool:
    """Return True if this process holds the key that a reference `held:N` names."""
    return reference in _HELD


def check_reference(reference: str, where: str) -> None:
    """Raise `credential-literal` if an option holds a key instead of the name of its source."""
    if not reference.startswith(SOURCES):
        problem = "this does not name a source that a key is read from"
        remedy = "Write env:NAME, file:PATH or cmd:COMMAND; in Python pass api_key= to luthier.provider."
        raise LuthierError("credential-literal", problem, where=where, remedy=remedy)


def read_secret(reference: str, where: str) -> Secret:
    """Return the key that `env:NAME`, `file:PATH`, `cmd:COMMAND` or `held:N` names. Raises `credential-missing`."""
    check_reference(reference, where)
    source, _, name = reference.partition(":")
    if source == "held":
        if reference not in _HELD:
            problem, remedy = "the key was given in Python and is not kept", "Give it again, or set it by env:NAME."
            raise LuthierError("credential-missing", problem, where=where, remedy=remedy)
        return _HELD[reference]
    text = _READERS[source](name, where)
    if not text.strip():
        raise LuthierError("credential-missing", f"{reference} is empty", where=where)
    return Secret(text)


def redact_text(text: str) -> str:
    """Return the text without any known key, and without the queries of signed links."""
    for value in list(_KNOWN):
        if len(value) >= SHORTEST:
            for form in {value, quote(value, safe=""), quote_plus(value)}:
                text = text.replace(form, MASK)
    return LINK.sub(lambda match: redact_link(match[0]), text)


def redact_link(link: str) -> str:
    """Return a link without user and password, and without its query if that looks signed."""
    try:
        parts = urlsplit(link)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return MASK
    query = MASK if SIGNED.search(f"?{parts.query}") else parts.query
    place = f"[{host}]" if ":" in host else host
    return urlunsplit((parts.scheme, f"{place}{port}", parts.path, query, ""))


def redact_value(value: Any) -> Any:
    """Return plain data with every text in it redacted, and every field with a key's name masked."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {k: MASK if _names_secret(k) and v else redact_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_value(item) for item in value]
    return value


def _names_secret(name: object) -> bool:
    lowered = re.sub(r"[^a-z]", "", str(name).lower())
    return lowered.endswith(("apikey", "apitoken", "accesstoken", "password", "secret", "wandbkey", "secretaccesskey"))


def _from_environment(name: str, where: str) -> str:
    if name not in os.environ:
        raise LuthierError("credential-missing", f"the variable {name} is not set", where=where,
                           remedy=f"Run: export {name}=...")  # fmt: skip
    return os.environ[name]


def _from_file(name: str, where: str) -> str:
    try:
        return Path(name).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{name} cannot be read: {getattr(error, 'strerror', None) or 'not text'}"
        raise LuthierError("credential-missing", problem, where=where) from None


def _from_command(line: str, where: str) -> str:
    try:
        done = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True, timeout=60)
    except (OSError, ValueError, subprocess.SubprocessError):
        raise LuthierError("credential-missing", f"the command {line!r} failed", where=where) from None
    return done.stdout


_READERS: Final = {"env": _from_environment, "file": _from_file, "cmd": _from_command}
