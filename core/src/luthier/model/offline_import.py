"""Imports that look at no network, of libraries that would fetch something where they are imported."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Final

FETCHERS: Final = ("kernels",)  # packages by which bitsandbytes fetches a binary from a hub, on some processors
TELLERS: Final = ("bitsandbytes.backends.cpu.ops",)  # loggers that would advise to install one of them


def import_offline(name: str) -> ModuleType:
    """Return a module, imported while the packages by which it would fetch something are hidden from it."""
    with ExitStack() as stack:
        for fetcher in FETCHERS:
            stack.enter_context(hide_package(fetcher))
        for teller in TELLERS:
            stack.enter_context(_silenced(teller))
        return importlib.import_module(name)


@contextmanager
def hide_package(name: str) -> Iterator[None]:
    """Hide this package from imports within this context; code that has imported it keeps it."""
    before = {key: module for key, module in sys.modules.items() if key == name or key.startswith(f"{name}.")}
    for key in before:
        del sys.modules[key]
    sys.modules[name] = None  # type: ignore[assignment]  # by which Python marks a package that is not to be found
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(before)


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
