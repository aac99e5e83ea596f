"""The error that a test expects: its code and its place, but not the words of its sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from luthier.errors import LuthierError


class ExpectedError:
    """The error that `expect_error` caught: `value` is set once the block has ended."""

    value: LuthierError


@contextmanager
def expect_error(code: str, where: str | None = None, *names: str) -> Iterator[ExpectedError]:
    """Fail unless the block raises a `LuthierError` with this code, at this place.

    The error's place equals `where` or ends with it, as paths of temporary folders do; None means that the error has no
    place. `names` are facts that its text must contain: a name, a number, a command, but no sentence. Other exceptions
    pass through.
    """
    caught = ExpectedError()
    try:
        yield caught
    except LuthierError as error:
        caught.value = error
        if (error.code, _end_of(error.where, where)) != (code, where):
            raise AssertionError(f"expected {code!r} at {where!r}, got {error.code!r} at {error.where!r}") from error
        missing = [name for name in names if name not in str(error)]
        if missing:
            raise AssertionError(f"expected {', '.join(missing)} in: {error}") from error
        return
    raise AssertionError(f"expected {code!r} at {where!r}, but no error was raised")


def _end_of(place: str | None, where: str | None) -> str | None:
    """Return `where` if the place ends with it and no word is cut, else the place."""
    return where if place and where and re.search(rf"(?:(?<!\w)|(?=\W)){re.escape(where)}\Z", place) else place
