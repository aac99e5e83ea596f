"""The registry of operations: the implementations of each name, the fittest chosen call by call, and said once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import nn

from luthier.logs import get_logger
from luthier.model.operations import reference
from luthier.model.operations.guard import GuardedOperation
from luthier.model.operations.tensor_source import note_source
from luthier.plugins.contracts.operation_names import OPERATIONS

log = get_logger()
Predicate = Callable[[torch.device, torch.dtype, torch.Size], bool]

REFERENCES: Final[dict[str, Callable[..., Any]]] = {name: getattr(reference, name) for name in OPERATIONS}


@attrs.frozen(kw_only=True)
class Implementation:
    """One way to compute `operation`: `function` takes its reference's arguments and is differentiable.

    `supports(device, dtype, shape)` is asked about the first argument. Of several that support it, the one with the
    highest priority is taken, then the first. `guard` is there for what a plugin offers.
    """

    operation: str
    name: str
    function: Callable[..., Any]
    supports: Predicate = lambda device, dtype, shape: True
    priority: int = 0
    guard: GuardedOperation | None = None

    def __attrs_post_init__(self) -> None:
        assert self.operation in REFERENCES, f"no operation is called {self.operation}"

    def __str__(self) -> str:
        owner = f" ({self.guard.owner})" if self.guard else ""
        return f"{self.operation}: {self.name}{owner}"


class Operations:
    """The operations of one run. `implementations` come in order of preference; the references stand behind them.

    `stands_in`: the run is rehearsed without values, and what a plugin offers is noted but not called.
    """

    def __init__(self, implementations: Iterable[Implementation] = ()) -> None:
        last = (Implementation(operation=n, name="reference", function=f) for n, f in REFERENCES.items())
        self._known: dict[str, list[Implementation]] = {one.operation: [one] for one in last}
        self.prefer(implementations)
        self.stands_in = False
        self._said: set[tuple[str, str, str, torch.dtype]] = set()
        self._ran: set[str] = set()

    def prefer(self, implementations: Iterable[Implementation]) -> None:
        """Put these in front of those that are known and have no higher priority, in their order."""
        for implementation in reversed(list(implementations)):
            self._known[implementation.operation].insert(0, implementation)
        for known in self._known.values():
            known.sort(key=lambda one: -one.priority)

    def rms_norm(self, *arguments: Any, **named: Any) -> torch.Tensor:
        return self._compute("rms_norm", arguments, named)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, *rest: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # the offered norm computes the norm of the sum too
        if self.has_offers("rms_norm") and not self.has_offers("add_rms_norm"):
            total = x if residual is None else x + residual
            return total, self._compute("rms_norm", (total, *rest), named)
        return self._compute("add_rms_norm", (x, residual, *rest), named)

    def rope(self, *arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._compute("rope", arguments, named)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return note_source(self._compute("swiglu", (gate, up), {}), self.swiglu, gate, up)

    def geglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return note_source(self._compute("geglu", (gate, up), {}), self.geglu, gate, up)

    def has_offers(self, operation: str) -> bool:
        """Return True if a plugin's form of the operation may be used."""
        return any(one.guard is not None and not one.guard.fallen for one in self._known[operation])

    def compute_offered(self, operation: str, *arguments: Any) -> Any:
        """Return the result of a plugin's form of the operation; NotImplemented where none is for this call."""
        if not self.has_offers(operation) or torch.compiler.is_compiling():
            return NotImplemented
        first = arguments[0]
        for one in self._known[operation]:
            if one.guard is None or not one.supports(first.device, first.dtype, first.shape):
                continue
            result = NotImplemented if self.stands_in else one.function(*arguments)
            if self.stands_in or result is not NotImplemented:
                self._say(one, first)
                return result
        return NotImplemented

    def say_again(self) -> None:
        """Name each implementation at its next use once more: the run's log begins after the probe."""
        self._said.clear()

    def ran(self) -> list[str]:
        """Return `operation: implementation` for each operation computed so far."""
        return sorted(self._ran)

    def _compute(self, operation: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        # an outer compiler fuses plain torch, but stops at code that it cannot see into
        if torch.compiler.is_compiling():
            return REFERENCES[operation](*arguments, **named)
        first, noted = arguments[0], False
        for one in self._known[operation]:
            if not one.supports(first.device, first.dtype, first.shape):
                continue
            if one.guard is not None and self.stands_in:
                self._say(one, first)
                noted = True
                continue
            result = one.function(*arguments, **named)
            if result is not NotImplemented:
                if not noted:
                    self._say(one, first)
                return result
        raise AssertionError(f"nothing computes {operation}")

    def _say(self, one: Implementation, first: torch.Tensor) -> None:
        said = (one.operation, one.name, first.device.type, first.dtype)
        if said not in self._said:
            self._said.add(said)
            self._ran.add(f"{one.operation}: {one.name}")
            fields: dict[str, str] = {"device": first.device.type, "dtype": str(first.dtype).removeprefix("torch.")}
            if one.guard:
                fields["owner"] = one.guard.owner
            log.debug("operation", name=one.operation, implementation=one.name, **fields)


_ACTIVE: Final[WeakKeyDictionary[nn.Module, Operations]] = WeakKeyDictionary()  # by module of a model


def active_operations(module: nn.Module) -> Operations:
    """Return the operations that the module's model computes by; the references alone where none are installed."""
    return _ACTIVE.get(module, _NONE)


def set_active(model: nn.Module, operations: Operations | None) -> None:
    """Let the model's head and attention find the operations; None: the references again."""
    for module in model.modules():
        if operations is None:
            _ACTIVE.pop(module, None)
        else:
            _ACTIVE[module] = operations


_NONE: Final = Operations()
