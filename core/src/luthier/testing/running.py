"""The running of a law: hypothesis over options and models, the same examples everywhere, one torch thread."""

from __future__ import annotations

import os
import unittest
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import attrs
import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from luthier.errors import LuthierError
from luthier.testing.laws import Law, NotRun, Subject
from luthier.testing.strategies import bases_of, options_of

BUDGET: Final = "LUTHIER_EXAMPLES"  # the number of examples of a check that has 20; others in proportion
USUAL: Final = 20
DEFECTS: Final = frozenset(  # codes that are the part's own fault, never a refusal of options
    ("internal", "part-invalid", "plugin-invalid", "part-broken", "checkpoint-state")
)


def run_law(law: Law, subject: Subject) -> None:
    """Raise if the subject breaks the law."""
    __tracebackhide__ = True
    with torch_settings(subject) if law.needs_torch else nullcontext():
        if law.examples == 0:
            _run_once(law, subject)
            return
        drawn = {n: s if isinstance(s, SearchStrategy) else s(subject) for n, s in law.drawn.items()}
        sample_options(subject, law.function, law.examples, drawn, default_only=law.default_only)


def _run_once(law: Law, subject: Subject) -> None:
    __tracebackhide__ = True
    try:
        law.function(subject)
    except NotRun as reason:
        raise unittest.SkipTest(f"{subject}: {reason}") from None


def sample_options(
    subject: Subject,
    function: Callable[..., None],
    examples: int,
    drawn: dict[str, SearchStrategy[Any]] | None = None,
    *,
    default_only: bool = False,
) -> None:
    """Call `function(subject, options, **drawn)` on the author's options and on drawn ones.

    Options that the part refuses with a `LuthierError` do not count, which is printed, except the default and the
    author's own. Raises `unittest.SkipTest` if no example ran the part.
    """
    __tracebackhide__ = True
    cls, own = subject.options_class, subject.own_examples
    bases, tally = bases_of(cls, own), Tally()
    attempt = _attempt(subject, function, bases, tally)
    for example in own:  # hypothesis would try them first, but promises it for none
        _search(attempt, max(1, examples // 4), options=st.just(example), **(drawn or {}))
    varied = options_of(cls, own) if subject.vary and not default_only else st.sampled_from(bases)
    _search(attempt, examples, options=varied, **(drawn or {}))
    if tally.refusals:
        print(f"{function.__name__}: {len(tally.refusals)} drawn options were refused, as {tally.refusals[0]}")
    if not tally.ran and tally.reasons:
        raise unittest.SkipTest(f"{subject}: {tally.reasons[0]}")


@attrs.define(kw_only=True)
class Tally:
    """A count of how often a law ran the part, why it did not, and which options the part refused."""

    ran: int = 0
    reasons: list[str] = attrs.field(factory=list)
    refusals: list[str] = attrs.field(factory=list)


def _attempt(
    subject: Subject, function: Callable[..., None], bases: Sequence[object], tally: Tally
) -> Callable[..., None]:
    """Return one example's run, under the function's name, which is shown if it fails."""

    def attempt(options: object, **world: Any) -> None:
        __tracebackhide__ = True
        try:
            with seeded():
                function(subject, options, **world)
            tally.ran += 1
        except NotRun as reason:
            tally.reasons.append(str(reason))
        except LuthierError as error:
            if options in bases or error.code in DEFECTS:
                raise
            tally.refusals.append(f"{options}: {error.line}")
            hypothesis.reject()

    attempt.__name__ = attempt.__qualname__ = function.__name__
    return attempt


def _search(function: Callable[..., None], examples: int, **strategies: SearchStrategy[Any]) -> None:
    __tracebackhide__ = True
    example_settings(examples)(given(**strategies)(function))()


def example_settings(examples: int, **more: Any) -> settings:
    """Return hypothesis settings: so many examples, the same on every machine, nothing stored on disk.

    Shrinking a check that builds models takes minutes and says little, so a failure is printed as it was drawn.
    """
    phases = (Phase.generate, Phase.shrink) if examples >= USUAL else (Phase.generate,)
    return settings(
        max_examples=max(1, examples * int(os.environ.get(BUDGET, USUAL)) // USUAL),
        derandomize=True,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **more,
    )


@contextmanager
def torch_settings(subject: Subject) -> Iterator[None]:
    """Set one thread (more are far slower on tiny tensors) and the author's model; skip if a device is missing."""
    import torch

    from luthier.testing.worlds import models_made_by

    record = subject.record
    if "cuda" in record.needs and not torch.cuda.is_available():
        raise unittest.SkipTest(f"{record.kind} {record.name!r} needs a CUDA device")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with models_made_by(subject.model):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeded() -> Iterator[None]:
    """Give each example the same random numbers, and restore the caller's afterwards; do nothing without torch."""
    import sys

    if "torch" not in sys.modules:
        yield
        return
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
