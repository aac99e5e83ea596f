"""The watch: it warns once of each problem in a run with finite numbers, from numbers that every step has anyway."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Final

import attrs

WINDOW: Final = 64  # earlier steps that a new one is compared with
ENOUGH: Final = 16  # steps that are needed before anything is compared
SPIKE: Final = 10.0  # robust standard deviations above the median
RISE: Final = 0.5  # ... and at least this share of the median above it,
FLOOR: Final = 0.1  # ... and at least this share of the first loss: a loss near 0 may rise tenfold
EXPLODED: Final = 10.0  # multiple of the median norm that counts as an explosion,
SUSTAINED: Final = 5  # ... if so many steps in a row have it
ABOVE: Final = 1.5  # multiple of the first step's loss, taken before any weight moved,
# ... if so many steps in a row have it: in less than one run of a hundred by chance, whatever the rows
LONG: Final = 32
TRIAL: Final = 100  # steps at the beginning and at the end whose losses are compared
FEWEST: Final = 30  # the fewest steps of each, in a shorter run
EVIDENCE: Final = 1.0  # standard errors of a fall that one of six runs which learn nothing shows by chance
SCALE: Final = 1.4826  # factor from the median absolute deviation to a normal distribution's standard deviation
TOLD: Final = 10  # the most spikes that are logged; all are counted
Rows = Callable[[], list[str]]


@attrs.frozen
class Remark:
    """A remark about a run: its kind, the step, the words of the log, and the numbers."""

    kind: str
    step: int
    told: str
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "step": self.step, "told": self.told, **self.facts}


@attrs.define
class Watch:
    """A watch that gets the loss, the gradient norm and the rate of each step that moved the weights."""

    losses: deque[float] = attrs.field(factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = attrs.field(factory=lambda: deque(maxlen=WINDOW))
    first: list[float] = attrs.field(factory=list)  # the losses of the first steps with a rate above 0
    last: deque[float] = attrs.field(factory=lambda: deque(maxlen=TRIAL))  # the losses of the last steps after those
    start_loss: float | None = None
    start_norm: float | None = None
    began_at: float | None = None  # the loss of the first step
    above: int = 0  # steps in a row far above it
    spikes: int = 0
    exploded: bool = False
    judged: bool = False

    def see(self, step: int, loss: float, norm: float, rate: float, rows: Rows = list) -> list[Remark]:
        """Return the remarks on step `step`.

        `rows` returns where its rows came from, and is called only for a remark.
        """
        remarks = [*self._spike(step, loss, rows), *self._explosion(step, norm), *self._divergence(step, loss)]
        self.losses.append(loss)
        self.norms.append(norm)
        if self.start_loss is None and len(self.losses) == ENOUGH:
            self.start_loss, self.start_norm = median(self.losses), median(self.norms)
        if rate > 0 and not self.judged:
            (self.first if len(self.first) < TRIAL else self.last).append(loss)
            if len(self.last) == TRIAL:
                remarks += self._flatness(step, self.first, list(self.last))
        return remarks

    def end(self, step: int) -> list[Remark]:
        """Return the remarks that only the end of a run allows, if it was too short to be judged before."""
        seen = [*self.first, *self.last]
        half = len(seen) // 2
        return [] if self.judged or half < FEWEST else self._flatness(step, seen[:half], seen[half:])

    def _spike(self, step: int, loss: float, rows: Rows) -> list[Remark]:
        if self.start_loss is None:
            return []
        centre = median(self.losses)
        spread = SCALE * median(abs(x - centre) for x in self.losses)
        least = max(SPIKE * spread, RISE * abs(centre), FLOOR * abs(self.start_loss))
        if loss - centre <= least:
            return []
        self.spikes += 1
        if self.spikes > TOLD:
            return []
        facts = {"loss": loss, "median": centre, "factor": round(loss / centre, 2) if centre > 0 else None}
        return [Remark("spike", step, "loss spike", {**facts, "rows": rows()[:TOLD]})]

    def _explosion(self, step: int, norm: float) -> list[Remark]:
        if self.exploded or self.start_norm is None or len(self.norms) < ENOUGH + SUSTAINED:
            return []
        *before, first, second, third, fourth = self.norms
        usual = max(median(before), self.start_norm)
        if min(first, second, third, fourth, norm) <= EXPLODED * usual:
            return []
        self.exploded = True
        facts = {"grad_norm": norm, "usual": usual, "steps": SUSTAINED}
        return [Remark("exploding", step, "the gradient norm explodes: the learning rate may be too high", facts)]

    def _divergence(self, step: int, loss: float) -> list[Remark]:
        """Return a remark if the loss stays high; a run destroyed in its first steps has no median to compare with."""
        if self.began_at is None:
            self.began_at = loss
        self.above = self.above + 1 if loss > ABOVE * abs(self.began_at) else 0
        if self.above != LONG:
            return []
        facts = {"first": self.began_at, "median_now": median(list(self.losses)[-LONG:]), "steps": LONG}
        sentence = "the loss stays above where it began: the learning rate may be too high"
        return [Remark("diverged", step, sentence, facts)]

    def _flatness(self, step: int, early: list[float], late: list[float]) -> list[Remark]:
        self.judged = True
        if fall(early, late) >= EVIDENCE:
            return []
        facts = {"steps": len(early) + len(late), "median_at_first": median(early), "median_now": median(late)}
        self.first.clear()
        self.last.clear()
        return [Remark("flat", step, "the model learns nothing: its loss has not fallen", facts)]

    def state(self) -> dict[str, Any]:
        """Return plain numbers: all that a resumed run needs to make the same remarks."""
        state = attrs.asdict(self, recurse=False)
        return {name: list(v) if isinstance(v, deque) else v for name, v in state.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            current = getattr(self, name)
            setattr(self, name, deque(value, current.maxlen) if isinstance(current, deque) else value)


def fall(early: list[float], late: list[float]) -> float:
    """Return how surely the late losses are below the early ones: the normal score of Mann and Whitney's U (1947).

    A run that learns nothing scores 0 on average; one of forty such runs scores 2 by chance.
    """
    wins = sum((b < a) + 0.5 * (b == a) for a in early for b in late)
    pairs = len(early) * len(late)
    return (wins - pairs / 2) / math.sqrt(pairs * (len(early) + len(late) + 1) / 12)
