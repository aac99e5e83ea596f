"""A few rewards: plain functions of answers and columns, each named by an entry point."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

NUMBER: Final = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def reward_exact_match(completions: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """Return 1 for each answer that equals the row's `answer`, apart from outer spaces, else 0."""
    return [float(text.strip() == str(wanted).strip()) for text, wanted in zip(completions, answer, strict=True)]


def reward_last_number(completions: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """Return 1 for each answer whose last number equals that of the row's `answer`, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float((said := _last_number(text)) is not None and said == _last_number(str(a))) for text, a in pairs]


def reward_distinct_words(completions: Sequence[str]) -> list[float]:
    """Return the share of distinct words in each answer, or 0 for an answer without words."""
    return [len(set(words)) / len(words) if (words := text.lower().split()) else 0.0 for text in completions]


def _last_number(text: str) -> float | None:
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
