"""Rewards to begin with: plain functions of answers and columns, each named by an entry point."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

NUMBER: Final = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def reward_exact_match(completions: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """Return 1 for each answer that is the row's `answer`, blanks around them aside, and 0 for any other."""
    return [float(text.strip() == str(wanted).strip()) for text, wanted in zip(completions, answer, strict=True)]


def reward_last_number(completions: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """Return 1 for each answer whose last number is that of the row's `answer`, and 0 for any other."""
    pairs = zip(completions, answer, strict=True)
    return [float((said := _last_number(text)) is not None and said == _last_number(str(a))) for text, a in pairs]


def reward_distinct_words(completions: Sequence[str]) -> list[float]:
    """Return the share of words in each answer that stand there for the first time; 0 where there is none."""
    return [len(set(words)) / len(words) if (words := text.lower().split()) else 0.0 for text in completions]


def _last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
