"""Dropout rates: where a model keeps them, whatever its architecture, and how they are set for the time of a run."""

from __future__ import annotations

import dis
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Final

import attrs
from torch import nn

from luthier.errors import LuthierError

WHERE: Final = "model.dropout"


@attrs.frozen
class Rate:
    """A rate of dropout: an attribute of a module, or of a config that some module reads in its forward."""

    holder: Any
    name: str
    value: float

    def set(self, value: float) -> None:
        setattr(self.holder, self.name, value)


def find_rates(model: nn.Module) -> list[Rate]:
    """Return every rate that the model computes with.

    A rate in a config counts only if a module reads it there in its forward. The others have been copied into modules,
    and the config keeps them as they are, so that the files of a trained model say what its base said.
    """
    rates = [rate for module in model.modules() for rate in _of_module(module)]
    seen = set[tuple[int, str]]()
    for module in model.modules():
        for rate in _of_config(module):
            if (id(rate.holder), rate.name) not in seen:
                seen.add((id(rate.holder), rate.name))
                rates.append(rate)
    return rates


def check_dropout(model: nn.Module, asked: float | None) -> None:
    """Raise `recipe-conflict` for a rate that is asked of a model without dropout."""
    if asked is not None and not find_rates(model):
        problem = f"a {type(model).__name__} has no dropout"
        raise LuthierError("recipe-conflict", problem, where=WHERE, found=asked, remedy="Leave it out.")


def set_rates(model: nn.Module, share: float | None) -> list[Rate]:
    """Let the whole model drop this share, and return the rates as they came; None changes nothing."""
    if share is None:
        return []
    rates = find_rates(model)
    for rate in rates:
        rate.set(share)
    return rates


@contextmanager
def dropping(model: nn.Module, share: float | None) -> Iterator[None]:
    """Let the whole model drop this share within this context; None changes nothing."""
    rates = set_rates(model, share)
    try:
        yield
    finally:
        for rate in rates:
            rate.set(rate.value)


def _of_module(module: nn.Module) -> Iterator[Rate]:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        yield Rate(module, "p", module.p)
        return
    yield from (Rate(module, name, value) for name, value in vars(module).items() if _is_rate(name, value))


def _of_config(module: nn.Module) -> Iterator[Rate]:
    config = getattr(module, "config", None)
    if config is None:
        return
    read = {name for function in _functions(type(module)) for name in _read_of_config(function)}
    yield from (
        Rate(config, name, value) for name, value in vars(config).items() if name in read and _is_rate(name, value)
    )


def _read_of_config(function: FunctionType) -> Iterator[str]:
    """Yield the names that a function reads of something that is called `config`."""
    names = [instruction.argval for instruction in dis.get_instructions(function)]
    yield from (name for owner, name in itertools.pairwise(names) if owner == "config" and isinstance(name, str))


def _functions(cls: type) -> Iterator[FunctionType]:
    """Yield a class's own methods, without the one that copies a config into the module."""
    for name, member in vars(cls).items():
        plain = getattr(member, "__wrapped__", member)
        if name != "__init__" and isinstance(plain, FunctionType):
            yield plain


def _is_rate(name: str, value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and ("dropout" in name or name.endswith("pdrop"))
