"""Checks: named properties of a part, chosen by what its record declares, run with pytest or without."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins.records import Record
from luthier.testing.laws import CHECKS, KINDS, Law, Subject


@attrs.frozen(kw_only=True, repr=False)
class Check:
    """One named check of one part. Calling it raises if the part fails.

    It raises `unittest.SkipTest` with the reason if the part was not run: it needs a device that this machine lacks,
    or does not do what the check is about.
    """

    law: Law
    subject: Subject

    @property
    def name(self) -> str:
        return self.law.name

    @property
    def id(self) -> str:
        return f"{self.subject.record.kind}-{self.subject.record.name}-{self.name}"

    @property
    def meaning(self) -> str:
        """Return what the check requires of a part, in a sentence or two."""
        return " ".join((self.law.function.__doc__ or "").split())

    def __call__(self) -> None:
        from luthier.testing.running import run_law

        __tracebackhide__ = True
        try:
            run_law(self.law, self.subject)
        except Exception as error:
            error.add_note(f"{self.name}: {self.meaning}")
            raise

    def __repr__(self) -> str:
        return f"<check {self.id}>"


def checks_for(
    record: Record,
    *,
    examples: Sequence[object] | None = None,
    vary: bool = True,
    together: Iterable[Record] = (),
    fake: Callable[[], Any] | None = None,
    model: Callable[[], Any] | None = None,
) -> Iterator[Check]:
    """Yield the checks of one record: those of every kind, then those of its own kind that apply to its declarations.

    `examples` are options objects that are tried as well; those of another part's class are ignored. `vary` False
    tries only the default and these, for options whose bounds are not declared. `together` are the records of the
    same plugin, whose names must differ. `fake` makes a fresh fake of a provider's service, a
    `luthier.testing.FakeService`; without it only the record is checked. `model()` returns a fresh causal LM with at
    least 264 tokens, on which every law that needs a model is run. Listing the checks imports no torch.
    """
    every, given = tuple(together) or (record,), tuple(examples or ())
    subject = Subject(record=record, together=every, examples=given, vary=vary, fake=fake, model=model)
    own = record.kind in KINDS or (record.kind == "provider" and fake is not None)
    for kind in ("all", record.kind) if own else ("all",):
        module = importlib.import_module(CHECKS[kind])
        for member in vars(module).values():
            if isinstance(member, Law) and member.applies(record):
                yield Check(law=member, subject=subject)


def conformance(
    records: Iterable[Record],
    expected_failures: Mapping[str, str] | None = None,
    examples: Sequence[object] | None = None,
    *,
    vary: bool = True,
    fake: Callable[[], Any] | None = None,
    model: Callable[[], Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run every check of every record as one pytest case: the decorated function gets it as `check` and calls it.

    `expected_failures` maps a check's name, or its whole id, to the reason why it fails; a check that passes
    nevertheless fails the test. `examples` are options objects to try besides those that the kit draws; with `vary`
    False it draws none. `fake` makes the fake service of a provider; `model` the model to run checks on (see
    `checks_for`), such as one with biases, Conv1D or experts.
    """
    import pytest

    every = tuple(records)
    reasons = dict(expected_failures or {})
    _refuse_foreign(every, examples or ())
    listed = (checks_for(r, examples=examples, vary=vary, together=every, fake=fake, model=model) for r in every)
    checks = [check for of_record in listed for check in of_record]
    _refuse_unknown(reasons, checks)
    cases = []
    for check in checks:
        reason = reasons.get(check.id, reasons.get(check.name))
        marks = (pytest.mark.xfail(reason=reason, strict=True),) if reason else ()
        cases.append(pytest.param(check, id=check.id, marks=marks))
    return pytest.mark.parametrize("check", cases)


def _refuse_unknown(reasons: Mapping[str, str], checks: Sequence[Check]) -> None:
    known = {c.name for c in checks} | {c.id for c in checks}
    for name, reason in reasons.items():
        if name not in known:
            raise LuthierError("plugin-invalid", f"no check is called {name!r}", where="expected_failures",
                               remedy=suggest_nearest(name, known))  # fmt: skip
        if not reason.strip():
            where = f"expected_failures.{name}"
            raise LuthierError("plugin-invalid", "an expected failure needs its reason", where=where)


def _refuse_foreign(records: Sequence[Record], examples: Sequence[object]) -> None:
    """Raise `plugin-invalid` for an example that no record takes, as it would be ignored; lazy classes pass."""
    classes = [r.options for r in records]
    for example in examples:
        if type(example) not in classes and not any(isinstance(c, str) for c in classes):
            raise LuthierError("plugin-invalid", "these are options of none of the records", where="examples",
                               found=example)  # fmt: skip
