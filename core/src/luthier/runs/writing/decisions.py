"""Decisions: what the run chose by itself, why, and the same again on resume."""

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
    """A JSON value, and why it is so. `kept`: it was taken when the run began."""

    value: Any
    reason: str
    kept: bool = False


class Decisions:
    """Everything that was decided for a run, by name; `run.json` keeps it under `decisions`.

    `held` is what `to_dict` gave when the run began; None for a new run, or to decide anew. `agree` gives every rank
    what rank 0 decides (see `World.decide`). `is_logged`: False for those of a rehearsal, which the run takes itself.
    """

    def __init__(
        self,
        held: Mapping[str, Any] | None = None,
        agree: Callable[[Callable[[], Any]], Any] = lambda decide: decide(),
        *,
        is_logged: bool = True,
    ) -> None:
        self._held, self._agree, self._is_logged = dict(held or {}), agree, is_logged
        self._taken: dict[str, Decision] = {}

    def take(
        self,
        name: str,
        decide: Callable[[], tuple[Value, str]],
        *,
        usable: Callable[[Any], bool] = lambda value: True,
    ) -> Value:
        """The value of `name`: taken before, held from the run's beginning, or else what `decide` gives, with why.

        `usable` says whether a held value can still be had here; where it cannot, `decide` is asked again, aloud.
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
        """A value that nobody had to choose: recorded with the others, and never replaced by a held one."""
        before = self._held.get(name)
        if before is not None and before["value"] != value:
            log.warning("not as when the run began", name=name, was=before["value"], now=value, because=reason)
        self._keep(name, Decision(value=value, reason=reason))
        return value

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """`{name: {value, reason}}`; what was held and not asked for in this process stays."""
        taken = {name: {"value": d.value, "reason": d.reason} for name, d in self._taken.items()}
        return {**self._held, **taken}

    def _keep(self, name: str, decision: Decision) -> None:
        json.dumps(decision.value)  # a value that run.json cannot hold is a defect of whoever decided it
        known = self._taken.get(name)
        self._taken[name] = decision
        if self._is_logged and (known is None or known.value != decision.value):
            fields = {"as": "when the run began"} if decision.kept else {}
            log.debug("decided", name=name, value=decision.value, reason=decision.reason, **fields)
