"""Rewards: functions found by name, called with what they name, and held to a number for each answer."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, Final

import attrs
from luthier import LuthierError

GROUP: Final = "luthier_rewards"
ROW: Final = "luthier_row"  # the column with a row's place
IN_PYTHON: Final = "python:"
RESERVED: Final = ("prompts", "completions", ROW)
HELD: dict[str, Callable[..., Any]] = {}  # functions of the caller's, by the name that a recipe has for them


def name_function(function: Callable[..., Any]) -> str:
    """Return the name by which a recipe means a function of this process."""
    name = f"{IN_PYTHON}{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    HELD[name] = function
    return name


def find_reward(name: str, where: str) -> Callable[..., Any]:
    """Return the function that an entry point, `module:function`, or a name of this process stands for."""
    if name.startswith(IN_PYTHON):
        if name in HELD:
            return HELD[name]
        problem = "this reward was a function in Python, and cannot be loaded from a file"
        raise LuthierError("part-unknown", problem, where=where, found=name, remedy="Pass the function again.")
    found: Any = _load(name, where)
    if not callable(found):
        raise LuthierError("part-invalid", "a reward is a function", where=where, found=name)
    return found


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
        raise LuthierError("part-broken", problem, where=where, found=name) from error
    remedy = f"Write one of {', '.join(sorted(entries))}, or module:function."
    raise LuthierError("part-unknown", "no reward has this name", where=where, found=name, remedy=remedy)


@attrs.frozen(kw_only=True)
class CheckedReward:
    """A reward as TRL calls it: with texts and the columns that it names, each of its numbers finite or None."""

    name: str
    function: Callable[..., Any]
    columns: tuple[str, ...]  # that it is given; with ** all of them

    @classmethod
    def of_function(cls, name: str, function: Callable[..., Any], columns: Sequence[str]) -> CheckedReward:
        """Return the checked form of a function; `data-column` where it names a column that the rows lack."""
        parameters = inspect.signature(function).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return cls(name=name, function=function, columns=("prompts", *columns))
        named = [
            p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "completions"
        ]
        known = {"prompts", *columns}
        for parameter in named:
            if parameter.name not in known and parameter.default is parameter.empty:
                problem = f"reward {name!r} reads a column {parameter.name!r}, and the rows have none"
                remedy = f"They have: {', '.join(sorted(columns)) or 'none'}. Map one with data.columns."
                raise LuthierError("data-column", problem, where="trainer.reward", remedy=remedy)
        return cls(name=name, function=function, columns=tuple(p.name for p in named if p.name in known))

    @property
    def __name__(self) -> str:
        """The name by which TRL reports it."""
        return self.name.rpartition(":")[2].rpartition(".")[2]

    def __call__(self, *, completions: Sequence[Any], prompts: Sequence[Any], **columns: Any) -> list[float | None]:
        """Return a number for each answer, or None; `part-broken` names the reward and the row where it fails."""
        texts, rows = [text_of(answer) for answer in completions], columns.get(ROW, ())
        given = {"prompts": list(prompts), **{n: v for n, v in columns.items() if n in self.columns}}
        arguments = {name: _stretched(given[name], len(texts)) for name in self.columns}
        places = _stretched(list(rows), len(texts)) if rows else [""] * len(texts)
        numbers = self._call(texts, arguments, places)
        if len(numbers) != len(texts):
            raise self._broken(f"it gives {len(numbers)} numbers for {len(texts)} answers", places[0], None)
        return [self._number(number, place) for number, place in zip(numbers, places, strict=True)]

    def _call(self, texts: list[str], arguments: Mapping[str, Any], places: Sequence[str]) -> list[Any]:
        try:
            return list(self.function(completions=texts, **arguments))
        except Exception as error:
            place = self._failing(texts, arguments, places)
            raise self._broken(f"it raises {type(error).__name__}: {error}", place, None) from error

    def _failing(self, texts: list[str], arguments: Mapping[str, Any], places: Sequence[str]) -> str:
        """The place of the first row that raises when it is asked about alone; of the first one where none does."""
        for number, place in enumerate(places):
            alone = {name: [values[number]] for name, values in arguments.items()}
            try:
                list(self.function(completions=[texts[number]], **alone))
            except Exception:
                return place
        return places[0]

    def _number(self, number: Any, place: str) -> float | None:
        if number is None:
            return None
        try:
            value = float(number)
        except (TypeError, ValueError):
            raise self._broken("it gives what is no number", place, number) from None
        if not math.isfinite(value):
            raise self._broken("it gives what is not finite", place, value)
        return value

    def _broken(self, problem: str, place: str, found: Any) -> LuthierError:
        where = f"reward {self.name!r}: row {place}" if place else f"reward {self.name!r}"
        return LuthierError("part-broken", problem, where=where, found=found,
                            remedy="Mend the function; None says that it has no opinion.")  # fmt: skip


def text_of(answer: Any) -> str:
    """Return an answer's text, which is the content of its messages where the prompts are messages."""
    return answer if isinstance(answer, str) else "".join(str(message.get("content") or "") for message in answer)


def _stretched(values: Sequence[Any], count: int) -> list[Any]:
    """Return a column for `count` answers: where several are to each prompt, the prompts may come once."""
    return [values[number % len(values)] for number in range(count)]
