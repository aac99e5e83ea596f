"""Findings of recognition: why a module that looks like one of ours keeps its own forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeVar

import attrs
from torch import nn

from luthier.errors import LuthierError

Result = TypeVar("Result")
Reason = Literal["unknown argument", "other numbers", "raised"]
# the reasons closest to a recognition first
CLOSEST: Final[tuple[Reason, ...]] = ("unknown argument", "other numbers", "raised")
# errors that a forward raises for tensors it was not written for; any other error is the module's own
TRIAL_ERRORS: Final = (
    *(RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, ArithmeticError),
    LuthierError,
)


@attrs.frozen(kw_only=True)
class Finding:
    """One reason, and what it was in this case."""

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Findings:
    """The findings of the attempts on one module, by reason."""

    def __init__(self) -> None:
        self._found: dict[Reason, Finding] = {}

    def add_unknown(self, names: object) -> None:
        """Record that a forward needs, or passes on, arguments whose meaning is not known."""
        self._add(Finding(reason="unknown argument", detail=str(names)))

    def add_difference(self, detail: str = "") -> None:
        """Record that a forward ran and gave other numbers."""
        self._add(Finding(reason="other numbers", detail=detail))

    def attempt(self, function: Callable[[], Result]) -> Result | None:
        """Return what the function returns; None, recorded, where it raised."""
        try:
            return function()
        except TRIAL_ERRORS as error:
            first = (str(error).splitlines() or [""])[0]
            self._add(Finding(reason="raised", detail=f"{type(error).__name__}: {first}"[:200]))
            return None

    def closest(self) -> Finding | None:
        """Return the finding of the attempt that came closest to a match; None if there is none."""
        return next((self._found[reason] for reason in CLOSEST if reason in self._found), None)

    def _add(self, finding: Finding) -> None:
        self._found.setdefault(finding.reason, finding)


@attrs.frozen(kw_only=True)
class Signature:
    """The arguments that a module's own forward takes by name."""

    names: frozenset[str]
    required: frozenset[str]  # arguments without default, except the first one, which is the hidden states
    takes_others: bool  # True if it has **kwargs

    @classmethod
    def of_forward(cls, module: nn.Module) -> Signature:
        """Read it from the forward that calling the module would run."""
        parameters = list(inspect.signature(module.forward).parameters.values())
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        required = frozenset(p.name for p in named[1:] if p.default is p.empty)
        takes_others = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return cls(names=frozenset(p.name for p in named), required=required, takes_others=takes_others)

    def select(self, arguments: Mapping[str, Any], findings: Findings) -> dict[str, Any] | None:
        """Return those of the arguments that the forward takes; None, recorded, where it needs others."""
        unknown = sorted(self.required - arguments.keys())
        if unknown:
            findings.add_unknown(", ".join(unknown))
            return None
        return {name: value for name, value in arguments.items() if self.takes_others or name in self.names}
