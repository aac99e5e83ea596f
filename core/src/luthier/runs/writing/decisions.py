"""Decisions: what a run chose by itself and why, and how a resumed run gets the same choices again."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs

from luthier.logs import get_logger

log = get_logger()
Value = TypeVar("Value")


@attrs.frozen(kw_only=True)
class Decision:
    """A JSON value and the reason for it. `kept` is True if it was decided when the run began."""

    value: Any
    reason: str
    kept: bool = False


class Decisions:
    """All decisions of a run, by name. `run.json` keeps them under `decisions`.

    `held` is what `to_dict` returned when the run began; None for a new run, or to decide again. `agree` gives every
    rank what rank 0 decides (see `World.decide`). `is_logged` is False in a rehearsal, because the run logs its own
    later.
    """

    def __init__(
        self,
        decisions: Mapping[str, Any] | None = None,
        agree: Callable[[Callable[[], Any]], Any] = lambda decide: decide(),
        *,
        is_logged: bool = True,
    ) -> None:
        self._held, self._agree, self._is_logged = dict(decisions or {}), agree, is_logged
        self._taken: dict[str, Decision] = {}
        self.bounded: list[str] = []  # names of what a plan cannot decide, and takes as the most that it can be

    def take(
        self,
        name: str,
        decide: Callable[[], tuple[Value, str]],
        *,
        usable: Callable[[Any], bool] = lambda value: True,
    ) -> Value:
        """Return the value of `name`: as it was taken before, as it was when the run began, or as `decide` gives it
        now.

        `decide` returns the value and the reason. `usable` says whether an earlier value can be used here; if it
        cannot, `decide` is called again and a warning says so.
        """
        if name not in self._taken:
            before = self._held.get(name)
            if before is not None and not self._agree(functools.partial(usable, before["value"])):
                log.warning("decided anew", name=name, was=before["value"], because="it cannot be had here")
                before = None
            if before is None:
                value, reason = self._agree(decide)
                self._keep(name, Decision(value=value, reason=reason))
            else:
                self._keep(name, Decision(value=before["value"], reason=before["reason"], kept=True))
        return self._taken[name].value

    def explicit(self, name: str, value: Value, reason: str = "set in the recipe") -> Value:
        """Record and return a value that the recipe sets. It is never replaced by the value of an earlier start."""
        before = self._held.get(name)
        if before is not None and before["value"] != value:
            log.warning("not as when the run began", name=name, was=before["value"], now=value, because=reason)
        self._keep(name, Decision(value=value, reason=reason))
        return value

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return `{name: {value, reason}}`. It includes earlier decisions that this process did not ask for."""
        taken = {name: {"value": d.value, "reason": d.reason} for name, d in self._taken.items()}
        return {**self._held, **taken}

    def _keep(self, name: str, decision: Decision) -> None:
        # fails at once for a value that run.json cannot hold, which is a defect of the code that decided it
        json.dumps(decision.value)
        known = self._taken.get(name)
        self._taken[name] = decision
        if self._is_logged and (known is None or known.value != decision.value):
            fields = {"as": "when the run began"} if decision.kept else {}
            log.debug("decided", name=name, value=decision.value, reason=decision.reason, **fields)
