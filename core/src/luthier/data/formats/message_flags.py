"""Flags: what a message says about its own part in the loss, under any of the names that trainers use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from luthier.data.read.row import broken_row

NUMBERS: Final = ("weight", "loss_weight")
SWITCHES: Final = ("train", "trainable", "training", "unmask", "loss_mask", "loss")
OPPOSITES: Final = ("masked",)
UNCLEAR: Final = ("mask", "train_detail")  # which of two opposites is meant, or parts of an answer
FLAGS: Final = (*NUMBERS, *SWITCHES, *OPPOSITES)
Flags = tuple[float | None, ...]  # each message's weight in the loss, None if it says nothing


def read_flags(raw: Sequence[Any], place: str) -> Flags:
    """Return the flag of each message; an empty tuple if no message has one."""
    flags = tuple(read_flag(message, f"{place}[{i}]") for i, message in enumerate(raw))
    return flags if any(flag is not None for flag in flags) else ()


def read_flag(message: object, place: str) -> float | None:
    """Return a message's weight in the loss, 0 for none at all; None if the message says nothing.

    Null counts as nothing. Raises `data-row` if two flags contradict each other.
    """
    if not isinstance(message, Mapping):
        return None
    for name in UNCLEAR:
        if message.get(name) not in (None, "", []):
            problem = f"{name} says which parts of the message are supervised, in a way that is not read"
            raise broken_row(f"{problem}; name the flag one of {', '.join(FLAGS)}", message[name], f"{place}.{name}")
    given = {name: message[name] for name in FLAGS if message.get(name) is not None}
    numbers = {name: _number(value, f"{place}.{name}") for name, value in given.items() if name in NUMBERS}
    states = {name: _state(value, f"{place}.{name}") for name, value in given.items() if name not in NUMBERS}
    trained = {on != (name in OPPOSITES) for name, on in states.items()} | {bool(w) for w in numbers.values()}
    if len(trained) > 1 or len(set(numbers.values())) > 1:
        raise broken_row("the flags of one message contradict each other", given, place)
    if numbers:
        return next(iter(numbers.values()))
    return float(trained.pop()) if trained else None


def _number(value: object, place: str) -> float:
    if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0:
        return float(value)
    raise broken_row("a weight must be a finite number of at least 0", value, place)


def _state(value: object, place: str) -> bool:
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise broken_row("must be true or false, or 1 or 0", value, place)


def flags_of_comparison(raw: object, answer: int, place: str) -> None:
    """Raise `data-row` if a flag contradicts a comparison, which supervises the last `answer` messages and no others.

    What is compared is supervised completely, and what comes before it never is.
    """
    for i, message in enumerate(raw if isinstance(raw, list) else ()):
        flag = read_flag(message, f"{place}[{i}]")
        spoken = isinstance(message, dict) and (message.get("role") == "assistant" or message.get("from") == "gpt")
        wanted = float(spoken and i >= len(raw) - answer)  # type: ignore[arg-type]
        if flag is not None and flag != wanted:
            said = "is supervised completely" if wanted else "cannot be supervised, as it belongs to the prompt"
            raise broken_row(f"a message of a comparison {said}, but its flag says otherwise", flag, f"{place}[{i}]")
