"""The registry of operations: the implementations of each name, the fittest chosen call by call, and said once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import attrs
import torch

from luthier.engine.operations import reference
from luthier.logs import get_logger

log = get_logger()
Predicate = Callable[[torch.device, torch.dtype, torch.Size], bool]

REFERENCES: Final[dict[str, Callable[..., Any]]] = {
    name: getattr(reference, name) for name in ("rms_norm", "add_rms_norm", "rope", "swiglu", "geglu")
}


@attrs.frozen(kw_only=True)
class Implementation:
    """One way to compute `operation`: `function` takes its reference's arguments and is differentiable.

    `supports(device, dtype, shape)` is asked about the first argument. Of several the first that supports it is taken.
    """

    operation: str
    name: str
    function: Callable[..., Any]
    supports: Predicate = lambda device, dtype, shape: True

    def __attrs_post_init__(self) -> None:
        assert self.operation in REFERENCES, f"no operation is called {self.operation}"


class Operations:
    """The operations of one run. `implementations` come in order of preference; the references stand behind them."""

    def __init__(self, implementations: Iterable[Implementation] = ()) -> None:
        last = (Implementation(operation=n, name="reference", function=f) for n, f in REFERENCES.items())
        self._known: dict[str, list[Implementation]] = {one.operation: [one] for one in last}
        self.prefer(implementations)
        self._said: set[tuple[str, str, str, torch.dtype]] = set()

    def prefer(self, implementations: Iterable[Implementation]) -> None:
        """Put these in front of those that are known, in their order."""
        for implementation in reversed(list(implementations)):
            self._known[implementation.operation].insert(0, implementation)

    def rms_norm(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._chosen("rms_norm", x)(x, *args, **kwargs)

    def add_rms_norm(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._chosen("add_rms_norm", x)(x, *args, **kwargs)

    def rope(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._chosen("rope", query)(query, *args, **kwargs)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self._chosen("swiglu", gate)(gate, up)

    def geglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self._chosen("geglu", gate)(gate, up)

    def ran(self) -> list[str]:
        """`operation: implementation` of everything that was computed so far."""
        return sorted({f"{operation}: {name}" for operation, name, *_ in self._said})

    def _chosen(self, operation: str, first: torch.Tensor) -> Callable[..., Any]:
        if torch.compiler.is_compiling():  # a compiler outside fuses plain torch, and stops at what it cannot see into
            return REFERENCES[operation]
        for implementation in self._known[operation]:
            if implementation.supports(first.device, first.dtype, first.shape):
                break
        said = (operation, implementation.name, first.device.type, first.dtype)
        if said not in self._said:
            self._said.add(said)
            device, dtype = first.device.type, str(first.dtype).removeprefix("torch.")
            log.info("operation", name=operation, implementation=implementation.name, device=device, dtype=dtype)
        return implementation.function
