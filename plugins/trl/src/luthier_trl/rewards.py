"""Rewards: functions found by name, called with the columns that they name, and checked for finite numbers."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Final

import attrs
from luthier import LuthierError, PromptRow

GROUP: Final = "luthier_rewards"
FINDABLE: Final = (
    "Write module:function of what Python can import: install its package, or put its folder on PYTHONPATH."
)
ROW: Final = "luthier_row"  # the column with a row's number
IN_PYTHON: Final = "python:"
RESERVED: Final = frozenset(("prompts", "completions"))  # names that are not columns
HELD: dict[str, Callable[..., Any]] = {}  # functions passed in Python, by their name in the recipe


def name_function(function: Callable[..., Any]) -> str:
    """Return the name by which a recipe means a function of this process; another of the same name is numbered."""
    plain = f"{IN_PYTHON}{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    name, number = plain, 1
    while not _is_same(HELD.setdefault(name, function), function):
        number += 1
        name = f"{plain}#{number}"
    return name


def _is_same(one: Any, other: Any) -> bool:
    """Return True for the same function or method; methods are new objects at each access."""
    return one is other or (inspect.ismethod(one) and one == other)


def reported_name(name: str) -> str:
    """Return the name by which TRL reports a reward: `m` of `package.module:m`."""
    return name.rpartition(":")[2].rpartition(".")[2]


def check_names(names: Sequence[str], where: str) -> None:
    """Raise if a reward does not exist, or two would be reported under one name."""
    reported: dict[str, str] = {}
    for name in names:
        find_reward(name, where)
        if (other := reported.get(reported_name(name))) is not None:
            problem = f"it and {other!r} would both be reported as {reported_name(name)!r}"
            raise LuthierError("recipe-conflict", problem, where=where, found=name,
                               remedy="Name each once, or rename one of the functions.")  # fmt: skip
        reported[reported_name(name)] = name


def find_reward(name: str, where: str) -> Callable[..., Any]:
    """Return the function of an entry point, of `module:function`, or of a name in this process."""
    if name.startswith(IN_PYTHON):
        if name in HELD:
            return HELD[name]
        problem = "this reward was a function in Python, and cannot be loaded from a file"
        raise LuthierError("part-unknown", problem, where=where, found=name, remedy="Pass the function again.")
    reward: Any = _load(name, where)
    if not callable(reward):
        raise LuthierError("part-invalid", "a reward must be a function", where=where, found=name)
    return reward


def _load(name: str, where: str) -> Any:
    entries = {entry.name: entry for entry in metadata.entry_points(group=GROUP)}
    module, _, attribute = name.partition(":")
    try:
        if name in entries:
            return entries[name].load()
        if attribute:
            return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        problem = f"the reward cannot be imported: {type(error).__name__}: {error}"
        remedy = FINDABLE if attribute else None
        raise LuthierError("part-broken", problem, where=where, found=name, remedy=remedy) from error
    remedy = f"Write one of {', '.join(sorted(entries))}, or module:function."
    raise LuthierError("part-unknown", "no reward has this name", where=where, found=name, remedy=remedy)


@attrs.frozen(kw_only=True, eq=False)
class CheckedReward:
    """A reward as TRL calls it. Its numbers are checked: each is finite or None."""

    name: str
    function: Callable[..., Any]
    rows: Sequence[PromptRow] = attrs.field(repr=False)  # in the order of their numbers
    columns: tuple[str, ...]  # columns that it gets besides `completions`; all of them if it has **

    @classmethod
    def of_function(cls, name: str, function: Callable[..., Any], rows: Sequence[PromptRow]) -> CheckedReward:
        """Return the checked form of a function. Raises `data-column` if the rows lack a column that it names."""
        columns = sorted({column for row in rows for column in row.columns} - RESERVED)
        parameters = inspect.signature(function).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return cls(name=name, function=function, rows=rows, columns=("prompts", *columns))
        named = [
            p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "completions"
        ]
        known = {"prompts", *columns}
        for parameter in named:
            if parameter.name not in known and parameter.default is parameter.empty:
                problem = f"reward {name!r} reads a column {parameter.name!r}, which the rows do not have"
                remedy = f"They have: {', '.join(columns) or 'none'}. Map one with data.columns."
                raise LuthierError("data-column", problem, where="trainer.reward", remedy=remedy)
        return cls(name=name, function=function, rows=rows, columns=tuple(p.name for p in named if p.name in known))

    @property
    def __name__(self) -> str:
        """The name under which TRL reports it."""
        return reported_name(self.name)

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Return a number or None for each answer. Raises `part-broken` with the reward and the row that fail.

        Of TRL's further arguments only the row numbers are read. With several answers to a row, its number may come
        once.
        """
        texts, numbers = [text_of(answer) for answer in completions], columns[ROW]
        rows = [self.rows[int(numbers[place % len(numbers)])] for place in range(len(texts))]
        values = self._call(texts, rows)
        if len(values) != len(texts):
            raise self._broken(f"it returns {len(values)} numbers for {len(texts)} answers", rows[0].where, None)
        return [self._number(value, row.where) for value, row in zip(values, rows, strict=True)]

    def _call(self, texts: list[str], rows: list[PromptRow]) -> list[Any]:
        try:
            return list(self.function(completions=texts, **self._arguments(rows)))
        except Exception as error:
            place = self._failing(texts, rows)
            raise self._broken(f"it raises {type(error).__name__}: {error}", place, None) from error

    def _arguments(self, rows: list[PromptRow]) -> dict[str, list[Any]]:
        """Return copies of the columns of these rows, because a function may change them. Missing values are None."""
        return {name: [copy.deepcopy(_column(row, name)) for row in rows] for name in self.columns}

    def _failing(self, texts: list[str], rows: list[PromptRow]) -> str:
        """Return the place of the first row that raises when it is evaluated alone, or of the first row."""
        for text, row in zip(texts, rows, strict=True):
            try:
                list(self.function(completions=[text], **self._arguments([row])))
            except Exception:
                return row.where
        return rows[0].where

    def _number(self, number: Any, place: str) -> float | None:
        if number is None:
            return None
        try:
            value = float(number)
        except (TypeError, ValueError):
            raise self._broken("it returns something that is not a number", place, number) from None
        if not math.isfinite(value):
            raise self._broken("it returns a number that is not finite", place, value)
        return value

    def _broken(self, problem: str, place: str, value: Any) -> LuthierError:
        return LuthierError("part-broken", problem, where=f"reward {self.name!r}: row {place}", found=value,
                            remedy="Correct the function. It may return None to give no reward.")  # fmt: skip


def text_of(answer: Any) -> str:
    """Return the text of an answer: of messages, their content."""
    return answer if isinstance(answer, str) else "".join(str(message.get("content") or "") for message in answer)


def _column(row: PromptRow, name: str) -> Any:
    return row.prompt if name == "prompts" else row.columns.get(name)
