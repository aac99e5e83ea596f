"""bitsandbytes, imported without a look at the network: on some processors it has the package `kernels`, where that is
installed, fetch a binary from a hub. A layer of ours opens its weight by itself and needs none."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FETCHER, TELLER = "kernels", "bitsandbytes.backends.cpu.ops"


@contextmanager
def hide_package(name: str) -> Iterator[None]:
    """Let whoever imports this package meanwhile find none; who has imported it keeps it."""
    before = {key: module for key, module in sys.modules.items() if key == name or key.startswith(f"{name}.")}
    for key in before:
        del sys.modules[key]
    sys.modules[name] = None  # type: ignore[assignment]  # by which Python marks a package that is not to be found
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(before)


_logger = logging.getLogger(TELLER)
_before, _logger.disabled = _logger.disabled, True  # it warns of the package, whose use it would advise
try:
    with hide_package(FETCHER):
        import bitsandbytes as _bitsandbytes
        import bitsandbytes.functional as _functional
finally:
    _logger.disabled = _before

bitsandbytes: Any = _bitsandbytes
functional: Any = _functional
