"""The monitor: it judges each step's numbers, warns once of each problem, and traces a step that is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from luthier.data.examples import TokenExample
from luthier.errors import LuthierError
from luthier.health.flow import FlowMeter, flow_metrics
from luthier.health.reach import Reach
from luthier.health.trace import Traceable, trace_step
from luthier.health.watch import Remark, Watch
from luthier.logs import get_logger
from luthier.model.nonfinite import SHOWN, Finding
from luthier.plugins.contracts.protocols import Adapter
from luthier.recipe import Recipe
from luthier.step.update import Update

log = get_logger()
IN_A_ROW: Final = 10  # skipped steps in a row after which the run stops in any case
KEPT: Final = 50  # the most remarks in the record
REMEDIES: Final = {
    "parameter": "The weights were damaged before this step: lower the learning rate, or check the base model's files.",
    "data": "Correct or remove the rows that are named.",
}


class Health:
    """The health of one run. The loop calls it with each update; its state is part of the checkpoint."""

    def __init__(self, recipe: Recipe, adapter: Adapter, peak_rate: float, traced: Traceable) -> None:
        self.recipe, self.adapter, self.peak_rate, self.traced = recipe, adapter, peak_rate, traced
        self.watch, self.reach = Watch(), Reach(adapter, traced.world)
        self.remarks: list[dict[str, Any]] = []
        self.skipped = 0
        self.in_a_row = 0
        self.overflows = 0  # overflows of float16's scaled gradient in a row
        self.meter: FlowMeter | None = None
        self.flow: dict[str, float] = {}  # of a step that is measured, until it is logged

    def begin(self) -> None:
        """Check the run before the first step."""
        self.reach.begin()
        if self.peak_rate == 0:
            self._tell([Remark("rate", 0, "the learning rate is 0 for the whole run", {})])

    def look(self, step: int) -> None:
        """Store the weights before step `step`, if its gradient flow is to be measured."""
        every = self.recipe.gradient_flow_steps
        self.meter = FlowMeter(self.adapter) if every and step % every == 0 else None

    def see(self, step: int, done: Update, examples: Sequence[TokenExample]) -> None:
        """Judge step `step`, trained on `examples`. Raises `train-nonfinite` if it must stop the run."""
        self.overflows = self.overflows + 1 if done.overflowed else 0
        if self.overflows == IN_A_ROW:  # a loss scale that was only too large has been corrected long before
            self._explain_overflow(step, done)
        if done.overflowed:
            return
        if not done.finite:
            self._skip_or_stop(step, done)
            return
        self.in_a_row = 0
        if self.meter is not None:
            self.flow = flow_metrics(self.meter.measure(done.grad_norm, self.recipe.max_grad_norm))
        rate = done.learning_rate
        self._tell(self.reach.see(step, rate))
        self._tell(self.watch.see(step, done.loss, done.grad_norm, rate, lambda: [e.where for e in examples]))

    def end(self, step: int) -> None:
        """Judge the whole run after its last step."""
        self._tell([*self.reach.end(step), *self.watch.end(step)])

    def report(self) -> dict[str, Any]:
        """Return what run.json keeps of the run's health."""
        return {"skipped_steps": self.skipped, "loss_spikes": self.watch.spikes, "remarks": self.remarks}

    def state(self) -> dict[str, Any]:
        state = {"remarks": self.remarks, "skipped": self.skipped, "in_a_row": self.in_a_row}
        return {**state, "watch": self.watch.state(), "reach": self.reach.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if not state:  # the state of a checkpoint written before this class existed
            return
        self.remarks = list(state["remarks"])
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.watch.load_state(state["watch"])
        self.reach.load_state(state["reach"])

    def _tell(self, remarks: list[Remark]) -> None:
        for remark in remarks:
            log.warning(remark.told, step=remark.step, **{k: v for k, v in remark.facts.items() if k != "steps"})
            self._keep(remark.to_dict())

    def _keep(self, remark: dict[str, Any]) -> None:
        if len(self.remarks) < KEPT:
            self.remarks.append(remark)

    def _skip_or_stop(self, step: int, done: Update) -> None:
        """Apply the policy `on_nonfinite`.

        All processes decide alike, because loss and norm are those of the global batch.
        """
        self.in_a_row += 1
        stops = self.recipe.on_nonfinite == "stop" or self.in_a_row >= IN_A_ROW
        finding = self._traced(step, done) if stops or self.in_a_row == 1 else None
        cause = finding.told if finding else "as the step before"
        sizes = {"loss": _json(done.loss), "grad_norm": _json(done.grad_norm)}
        rows = list(finding.where[:KEPT]) if finding else []
        place = {"cause": finding.cause, "place": finding.place, "micro_batch": finding.micro_batch} if finding else {}
        self._keep({"kind": "nonfinite", "step": step, "told": cause, **sizes, **place, "rows": rows})
        if stops:
            assert finding is not None
            raise self._error(step, done, finding)
        self.skipped += 1
        log.warning(
            "step skipped: not finite", step=step, **sizes, told=cause, rows=rows[:SHOWN], in_a_row=self.in_a_row
        )

    def _explain_overflow(self, step: int, done: Update) -> None:
        finding = self._traced(step, done)
        facts = {
            "cause": finding.cause,
            "place": finding.place,
            "rows": list(finding.where[:SHOWN]),
            "why": finding.told,
        }
        self._tell([Remark("overflow", step, "the gradient overflows float16 at one scale after the other", facts)])

    def _traced(self, step: int, done: Update) -> Finding:
        """Return the finding of a trace. A trace that itself fails must not hide the problem that it was to explain."""
        try:
            return trace_step(self.traced, step - 1, done.batches)
        except Exception as error:
            log.warning("the step could not be traced", error=f"{type(error).__name__}: {error}")
            return Finding(cause="none", place="", told="where it began could not be traced")

    def _error(self, step: int, done: Update, finding: Finding) -> LuthierError:
        row = f", the {self.in_a_row}th in a row" if self.in_a_row > 1 else ""
        problem = f"loss {done.loss}, gradient norm {done.grad_norm} at step {step}{row}: {finding.told}"
        return LuthierError("train-nonfinite", problem, where=finding.rows, remedy=REMEDIES.get(finding.cause))


def _json(number: float) -> float | str:
    """Return the number, or its text if JSON does not have it (NaN, infinity)."""
    return number if math.isfinite(number) else str(number)
