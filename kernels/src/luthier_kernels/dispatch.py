"""Choose the implementation of an operation by device, dtype and shape, and count what ran."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Offer = tuple[str, bool, Callable[[], Any]]  # name ("triton", "native", "torch"), whether it fits, the call

log = logging.getLogger("luthier_kernels")
_ran: Counter[tuple[str, str]] = Counter()
_broken: set[tuple[str, str]] = set()
_only: list[str] = []


def run_first(operation: str, *offers: Offer) -> Any:
    """Run the first implementation that fits, and return its result.

    If it raises, the error is logged, it is not tried again in this process, and the next one runs. The error of the
    last one is raised. Inside `only_implementation` the named one runs or raises.
    """
    fitting = [offer for offer in offers if _fits(operation, offer)]
    if not fitting:
        raise RuntimeError(f"{operation}: no implementation fits{' ' + repr(_only[-1]) if _only else ''}")
    for name, _, call in fitting[:-1]:
        try:
            result = call()
        except Exception as error:  # an implementation for one device must not end a run that another can serve
            if _only:
                raise
            _broken.add((operation, name))
            log.warning("%s: implementation %r failed and is not used again: %r", operation, name, error)
        else:
            _ran[operation, name] += 1
            return result
    name, _, call = fitting[-1]
    result = call()
    _ran[operation, name] += 1
    return result


def count_runs() -> dict[str, dict[str, int]]:
    """Return how often each implementation ran: operation -> implementation -> times."""
    counted: dict[str, dict[str, int]] = {}
    for (operation, name), times in sorted(_ran.items()):
        counted.setdefault(operation, {})[name] = times
    return counted


def forget_runs() -> None:
    """Set every count to zero, and try failed implementations again."""
    _ran.clear()
    _broken.clear()


@contextmanager
def only_implementation(name: str) -> Iterator[None]:
    """Allow only this implementation (`torch`, `native`, `triton`) inside the block: for tests and timing."""
    _only.append(name)
    try:
        yield
    finally:
        _only.pop()


def _fits(operation: str, offer: Offer) -> bool:
    name, fits, _ = offer
    if _only:
        return fits and name == _only[-1]
    return fits and (operation, name) not in _broken
