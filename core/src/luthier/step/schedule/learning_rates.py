"""Learning rates: one number for each optimizer step, known before the run begins, also where it has no end."""

from __future__ import annotations

import inspect
import itertools
import math
import typing
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins.structure import structure_value

Shape = Callable[..., float]


class Rates:
    """The learning rate of each step: `rates[step]`, from 0. `total` is None where there is no last step.

    `end` is what the schedule comes to after the last step; None: the rate of that step.
    """

    def __init__(self, known: list[float], later: Iterator[float] | None = None, *, peak: float | None = None,
                 end: float | None = None) -> None:  # fmt: skip
        self._known, self._later, self._end = array("d", known), later, end
        self.total = len(known) if later is None else None
        self.peak = max(known) if peak is None else peak

    def __getitem__(self, step: int) -> float:
        if self._later is not None and step >= len(self._known):
            self._known.extend(itertools.islice(self._later, step + 1 - len(self._known)))
        return self._known[step]

    def between(self, place: float) -> float:
        """Return the rate at a place between two steps, on the straight line from the one's to the other's."""
        step, part = int(place), place % 1.0
        if not part:
            return self[step]
        end = self[step] if self._end is None else self._end
        following = end if step + 1 == self.total else self[step + 1]
        return self[step] + part * (following - self[step])


def schedule_rates(name: str, peak: float, total: int, warmup: int, settings: dict[str, Any]) -> list[float]:
    """Return the learning rate of each of `total` steps.

    Our own shapes are constant, linear, cosine and one_cycle; any other name is transformers' (`get_scheduler`) or
    torch's (`torch.optim.lr_scheduler`), run once on a dummy parameter. As in transformers the first warm-up step has
    rate 0. Raises `recipe-out-of-range` for an unknown name and `recipe-unknown-option` for an unknown setting.
    """
    with _computed(name):
        if name not in OWN:
            return list(itertools.islice(_foreign(name, peak, total, warmup, settings), total))
        shape, settings = _own(name, peak, warmup, settings)
        length = max(total - warmup, 1)
        ramp = [peak * step / max(warmup, 1) for step in range(min(warmup, total))]
        return ramp + [peak * shape(step, length, **settings) for step in range(total - len(ramp))]


def final_rate(name: str, peak: float, total: int, warmup: int, settings: dict[str, Any]) -> float | None:
    """Return the rate that one of our own schedules comes to after its last step; None for another's, and in the
    warm-up.
    """
    if name not in OWN or warmup >= total:
        return None
    with _computed(name):
        shape, settings = _own(name, peak, warmup, settings)
        return peak * shape(total - warmup, total - warmup, **settings)


@contextmanager
def _computed(name: str) -> Iterator[None]:
    """Raise `recipe-out-of-range` for whatever a schedule's settings make its arithmetic, or its library's, raise."""
    try:
        yield
    except LuthierError:
        raise
    except Exception as error:
        problem = f"{name} cannot be computed with these: {type(error).__name__}: {error}"
        raise LuthierError("recipe-out-of-range", problem, where="lr_scheduler_kwargs") from error


def endless_rates(name: str, peak: float, warmup: int, settings: dict[str, Any]) -> Iterator[float]:
    """Return the learning rates of a run without a known end; `recipe-conflict` for a schedule that needs its length.

    Without it do: constant, linear and cosine with `decay_steps`, transformers' constant_with_warmup and inverse_sqrt,
    and those of torch's that have a length of their own or none.
    """
    if name not in OWN:
        if name == "OneCycleLR":
            raise _needs_length(name)
        return _foreign(name, peak, None, warmup, settings)
    shape, settings = _own(name, peak, warmup, settings)
    if shape is not _constant and not settings.get("decay_steps"):
        raise _needs_length(name)
    ramp = (peak * step / warmup for step in range(warmup))
    return itertools.chain(ramp, (peak * shape(step, 1, **settings) for step in itertools.count()))


def _needs_length(name: str) -> LuthierError:
    problem = f"the schedule {name} needs to know how many steps there are, and this run does not"
    remedy = "Set max_steps, choose constant or inverse_sqrt, or give linear or cosine lr_scheduler_kwargs.decay_steps."
    return LuthierError("recipe-conflict", problem, where="lr_scheduler_type", remedy=remedy)


def _own(name: str, peak: float, warmup: int, settings: dict[str, Any]) -> tuple[Shape, dict[str, Any]]:
    """Return one of luthier's own schedule shapes, with its settings checked."""
    shape = OWN[name]
    known = [p for p in inspect.signature(shape).parameters if p not in ("done", "length")]
    for setting in settings:
        if setting not in known:
            where = f"lr_scheduler_kwargs.{setting}"
            raise LuthierError("recipe-unknown-option", f"{name} has no such setting", where=where,
                               remedy=suggest_nearest(setting, known))  # fmt: skip
    if name == "one_cycle" and warmup:
        raise LuthierError("recipe-conflict", "one_cycle has its own warm-up", where="warmup_steps",
                           remedy="Use lr_scheduler_kwargs.pct_start.")  # fmt: skip
    hints = typing.get_type_hints(shape)
    settings = {n: structure_value(v, hints[n], f"lr_scheduler_kwargs.{n}") for n, v in settings.items()}
    if "min_lr" in settings:
        settings = {**settings, "min_lr": settings["min_lr"] / peak if peak else 0.0}
    return shape, settings


def _constant(done: int, length: int) -> float:
    return 1.0


def _linear(done: int, length: int, min_lr_ratio: float = 0.0, decay_steps: int | None = None) -> float:
    """From 1 to the floor over `decay_steps`, then level."""
    share = min(done / (decay_steps or length), 1.0)
    return 1.0 - (1.0 - min_lr_ratio) * share


def _cosine(
    done: int,
    length: int,
    min_lr_ratio: float = 0.0,
    min_lr: float | None = None,
    decay_steps: int | None = None,
    num_cycles: float = 0.5,
) -> float:
    """Cosine to the floor over `decay_steps` (Loshchilov & Hutter, arXiv 1608.03983, without restarts), then level."""
    floor = min_lr_ratio if min_lr is None else min_lr
    share = min(done / (decay_steps or length), 1.0)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * share))


def _one_cycle(
    done: int, length: int, pct_start: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4
) -> float:
    """Smith & Topin's policy (arXiv 1708.07120) as torch's OneCycleLR has it, cosine-annealed."""
    start, end = 1.0 / div_factor, 1.0 / (div_factor * final_div_factor)
    turn = pct_start * length - 1.0
    if done <= turn:
        return _between(start, 1.0, done / turn if turn else 1.0)
    return _between(1.0, end, (done - turn) / max(length - 1.0 - turn, 1e-12))


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


OWN: Final[dict[str, Shape]] = {"constant": _constant, "linear": _linear, "cosine": _cosine, "one_cycle": _one_cycle}


def _foreign(name: str, peak: float, total: int | None, warmup: int, settings: dict[str, Any]) -> Iterator[float]:
    """Return what a scheduler of transformers or torch gives, step by step."""
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    return _stepped(optimizer, _build(name, optimizer, total, warmup, settings))


def _stepped(optimizer: Any, scheduler: Any) -> Iterator[float]:
    optimizer.step()  # it changes nothing, but torch warns if a schedule moves before its optimizer
    while True:
        yield float(optimizer.param_groups[0]["lr"])
        scheduler.step()


def _build(name: str, optimizer: Any, total: int | None, warmup: int, settings: dict[str, Any]) -> Any:
    import torch
    from transformers import SchedulerType, get_scheduler

    theirs = [s.value for s in SchedulerType if s.value not in ("reduce_lr_on_plateau", "greedy")]
    torchs = [n for n, c in vars(torch.optim.lr_scheduler).items() if n.endswith("LR") and inspect.isclass(c)]
    torchs = [n for n in torchs if n not in ("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "LR")]
    try:
        if name in theirs:
            return get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=settings or None)
        if name in torchs:
            if warmup:
                raise LuthierError("recipe-conflict", f"torch's {name} has no warm-up", where="warmup_steps")
            return getattr(torch.optim.lr_scheduler, name)(optimizer, **settings)
    except (TypeError, ValueError) as error:
        if total is None and "num_training_steps" in str(error):
            raise _needs_length(name) from None
        raise LuthierError("recipe-unknown-option", f"{name}: {error}", where="lr_scheduler_kwargs") from None
    remedy = suggest_nearest(name, [*OWN, *theirs, *torchs])
    raise LuthierError("recipe-out-of-range", "no such schedule", where="lr_scheduler_type", found=name, remedy=remedy)
