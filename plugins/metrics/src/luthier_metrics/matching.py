"""Metrics that judge an answer as right or wrong, and metrics made from the user's functions."""

from __future__ import annotations

import importlib
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, Final

from luthier import LuthierError

from luthier_metrics import Custom, ExactMatch, PassAtK

NUMBER: Final = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
TARGET: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


class ExactMatchMetric:
    """The metric that is 1 for an answer that equals its reference, apart from spaces."""

    def __init__(self, options: ExactMatch) -> None:
        self.options = options

    def score_answer(self, prediction: str, reference: str) -> tuple[float, float]:
        """Return (1 or 0, 1)."""
        return float(self._plain(prediction) == self._plain(reference)), 1.0

    def _plain(self, text: str) -> str:
        text = text.lower() if self.options.ignore_case else text
        text = text.translate(PUNCTUATION) if self.options.ignore_punctuation else text
        return " ".join(text.split())


class PassAtKMetric:
    """The unbiased 1 - C(n - c, k) / C(n, k) for c right answers of n (Chen et al. 2021, arXiv 2107.03374)."""

    def __init__(self, options: PassAtK) -> None:
        self.k, self.num_answers, self.temperature = options.k, options.num_answers, options.temperature
        self.judge: Callable[[str, str], Any] = JUDGES.get(options.judge) or find_function(options.judge, "judge")

    def score_answers(self, predictions: Sequence[str], reference: str) -> tuple[float, float]:
        """Return (the probability, 1)."""
        right = sum(bool(self.judge(prediction, reference)) for prediction in predictions)
        count = len(predictions)
        return 1 - math.comb(count - right, self.k) / math.comb(count, self.k), 1.0


class CustomMetric:
    """The metric that a function of the user computes."""

    def __init__(self, options: Custom) -> None:
        self.name, self.function = options.function, find_function(options.function, "function")

    def score_answer(self, prediction: str, reference: str) -> tuple[float, float]:
        """Return (the function's number, 1)."""
        score = self.function(prediction, reference)
        if not isinstance(score, (bool, int, float)) or not math.isfinite(score):
            raise LuthierError("part-invalid", "the function must return a finite number", where=self.name, found=score)
        return float(score), 1.0


def same_text(prediction: str, reference: str) -> bool:
    """Return True if both texts are equal apart from spaces."""
    return prediction.split() == reference.split()


def contains_text(prediction: str, reference: str) -> bool:
    """Return True if the answer contains the reference, ignoring case."""
    return reference.strip().lower() in prediction.lower()


def same_number(prediction: str, reference: str) -> bool:
    """Return True if the last numbers of both are equal, and False if the reference has none."""
    given, wanted = (_last_number(text) for text in (prediction, reference))
    return given is not None and given == wanted


def _last_number(text: str) -> float | None:
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


JUDGES: Final[dict[str, Callable[[str, str], bool]]] = {
    "exact": same_text,
    "contains": contains_text,
    "number": same_number,
}


def find_function(target: str, where: str) -> Callable[..., Any]:
    """Return the function that `module:function` names. Raises `part-unknown` if there is none."""
    if not TARGET.fullmatch(target):
        remedy = f"Write module:function, or one of: {', '.join(JUDGES)}." if where == "judge" else "module:function"
        raise LuthierError("recipe-out-of-range", "it names no function", where=where, found=target, remedy=remedy)
    module, _, path = target.partition(":")
    try:
        function: Any = importlib.import_module(module)
        for name in path.split("."):
            function = getattr(function, name)
    except (ImportError, AttributeError) as error:
        remedy = "Install its package, or put its folder on PYTHONPATH."
        raise LuthierError("part-unknown", str(error), where=where, found=target, remedy=remedy) from error
    if not callable(function):
        raise LuthierError("part-invalid", "it is not a function", where=where, found=target)
    return function
