"""Laws: named properties that parts must have, and the part that is tested for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn

import attrs
from hypothesis.strategies import SearchStrategy

from luthier.plugins.records import Record
from luthier.plugins.registry import Offer, Plugins, Source

KINDS: Final = (
    *("loss", "adapter", "optimizer", "quantizer", "callback"),
    *("operation", "exporter", "metric", "penalty", "trainer", "benchmark", "engine"),
)


def register_record(record: Record) -> tuple[Plugins, Offer]:
    """Return a registry that holds only this record, installed or not."""
    source = Source(plugin=record.name, module=record.build.partition(":")[0], distribution="under test", version="0")
    return Plugins(autoload=False), Offer(record=record, source=source)


class NotRun(Exception):
    """The reason why a law did not run the part."""


def not_run(reason: str) -> NoReturn:
    """End a law that does not apply to this part. If no example ran the part, the check is skipped with the reason."""
    raise NotRun(reason)


@attrs.frozen(kw_only=True, repr=False)
class Subject:
    """The part under test: its record, the records checked along with it, and the author's example options.

    With `vary` the kit also draws options itself. `fake` makes the fake service that a provider is tested against,
    and `model` the author's model, which replaces the tiny ones.
    """

    record: Record
    together: tuple[Record, ...] = ()
    examples: tuple[object, ...] = ()
    vary: bool = True
    fake: Callable[[], Any] | None = None
    model: Callable[[], Any] | None = None

    def __repr__(self) -> str:
        return f"<{self.record.kind} {self.record.name!r}>"

    @property
    def options_class(self) -> type:
        plugins, offer = register_record(self.record)
        return plugins.options(offer)

    @property
    def own_examples(self) -> tuple[object, ...]:
        """Return the examples that are options of this part."""
        cls = self.options_class
        return tuple(e for e in self.examples if type(e) is cls)

    def build(self, options: object) -> Any:
        """Return the part, checked against the protocol of its kind."""
        plugins, offer = register_record(self.record)
        return plugins.build(offer, options)


Strategy = SearchStrategy[Any] | Callable[[Subject], SearchStrategy[Any]]


@attrs.frozen(kw_only=True)
class Law:
    """A property that every part of a kind must have: `function(subject, options, **drawn)`, or `function(subject)`.

    `examples` is the number of options and models tried; 0 for a law about the record alone. `applies` reads from the
    record if the law applies to it. With `default_only` the options are only the defaults and the author's examples.
    """

    function: Callable[..., None]
    examples: int
    drawn: dict[str, Strategy]
    applies: Callable[[Record], bool]
    default_only: bool
    needs_torch: bool

    @property
    def name(self) -> str:
        return self.function.__name__


def law(
    examples: int = 20,
    *,
    when: Callable[[Record], bool] = lambda record: True,
    default_only: bool = False,
    needs_torch: bool = True,
    **drawn: Strategy,
) -> Callable[[Callable[..., None]], Law]:
    """Return a decorator that makes a function of one of the kit's modules a check with the function's name.

    A value of `drawn` is a strategy, or a function that returns one for the part under test.
    """

    def mark(function: Callable[..., None]) -> Law:
        return Law(
            function=function,
            examples=examples,
            drawn=drawn,
            applies=when,
            default_only=default_only,
            needs_torch=needs_torch,
        )

    return mark


CHECKS: Final = {
    "all": "luthier.testing.kinds.part_checks",
    "provider": "luthier.testing.providers.provider_checks",
    "quantizer": "luthier.testing.quantizers.quantizer_checks",
    "benchmark": "luthier.testing.benchmarks.benchmark_checks",
    "engine": "luthier.testing.engines.engine_checks",
    **{
        kind: f"luthier.testing.kinds.{kind}_checks"
        for kind in KINDS
        if kind not in ("quantizer", "benchmark", "engine")
    },
}
