"""Faults in the middle of real code: an error raised at the start of a function, with nothing replaced."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def raise_inside(
    function: Callable[..., Any], error: BaseException, when: Callable[[FrameType], bool] = lambda frame: True
) -> Iterator[None]:
    """Raise `error` at the next call of a Python function in this thread, once.

    `when` is called at every call with its frame, whose `f_locals` are the arguments and whose `f_back` is the caller;
    the error is raised at the first call for which it returns True. Raises `AssertionError` if there was none.
    """
    code, before = inspect.unwrap(function).__code__, sys.gettrace()
    raised = list[BaseException]()

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code is code and not raised and when(frame):
            raised.append(error)
            sys.settrace(before)
            raise error

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
    assert raised, f"{function.__qualname__} was not called in this way"
