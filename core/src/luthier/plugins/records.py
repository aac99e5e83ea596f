"""Records: frozen plain data that describes the parts of a plugin before their code is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import attrs

from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins.contracts.operation_names import OPERATIONS

TAGS: Final = frozenset(
    ("dense-weights", "quantized-base", "rounded-activations", "trainable-weights", "reference", "paired-data")
    + ("unpaired-data", "calibration-data", "teacher", "packing", "cuda", "multi-rank", "closure")
)
OWN_TAG: Final = re.compile(r"[a-z0-9][a-z0-9_.\-]*:[a-z0-9][a-z0-9_.\-]*")
RESERVED: Final = ("name", "local")  # keys of a part's section in a recipe, so no option can have these names
NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.\-]*")
SOURCES: Final = {"metric": ("answers", "tokens"), "penalty": ("weights", "tokens")}  # what a record may be over
TOKEN_STATISTICS: Final = ("entropy", "top1")
TARGET: Final = re.compile(r"[\w.]+:\w+")


def as_tags(value: Any, where: str) -> frozenset[str]:
    """Return a tag, or several, as a set.

    Raises `plugin-invalid` for a tag that is neither one of `TAGS` nor written `name:tag`.
    """
    tags = _tags(value)
    for tag in sorted(tags - TAGS):
        if not OWN_TAG.fullmatch(tag):
            remedy = f"{suggest_nearest(tag, TAGS)} A plugin's own tag is written name:tag."
            raise LuthierError("plugin-invalid", f"unknown tag {tag!r}", where=where, remedy=remedy)
    return tags


def _tags(value: Any) -> frozenset[str]:
    return frozenset((value,) if isinstance(value, str) else value)


@attrs.frozen(kw_only=True)
class NoOptions:
    """The options class of a part without options."""


@attrs.frozen(kw_only=True)
class Record:
    """The description of one part. Every kind of record has these fields.

    - `name` selects the part in a recipe. `summary` is the one line that lists show.
    - `build` is `"module:attribute"`. The core imports it when a recipe uses the part, and calls
      `attribute(options)` once; the result is the part.
    - `options` is a frozen attrs class of `option()` fields, or `"module:attribute"` of one, imported when needed. A
      part without options leaves it out.
    - `needs`, `provides` and `conflicts` are sets of tags. Each tag in `needs` must be provided by another chosen part,
      the data, the model or the device; no tag in `conflicts` may be. A plugin's own tag is written `name:tag`.
    """

    kind: ClassVar[str] = ""

    name: str
    summary: str
    options: type | str = NoOptions
    build: str
    needs: frozenset[str] = attrs.field(default=frozenset(), converter=_tags)
    provides: frozenset[str] = attrs.field(default=frozenset(), converter=_tags)
    conflicts: frozenset[str] = attrs.field(default=frozenset(), converter=_tags)

    def __attrs_post_init__(self) -> None:
        where = f"{self.kind} record {self.name!r}"
        if not NAME.fullmatch(self.name):
            raise LuthierError(
                "plugin-invalid", "the name may hold only lower-case letters, digits, '.', '-' and '_'", where=where
            )
        if not self.summary or "\n" in self.summary:
            raise LuthierError("plugin-invalid", "the summary must be one line", where=where, found=self.summary)
        if not TARGET.fullmatch(self.build):
            raise LuthierError("plugin-invalid", "build must be 'module:attribute'", where=where, found=self.build)
        if isinstance(self.options, str):
            if not TARGET.fullmatch(self.options):
                raise LuthierError("plugin-invalid", "options given as text must be 'module:attribute'", where=where)
        else:
            check_options(self.options, where)
        as_tags(self.needs | self.provides | self.conflicts, where)
        sources = SOURCES.get(self.kind)
        if sources and getattr(self, "over", None) not in sources:
            raise LuthierError("plugin-invalid", f"over must be one of: {', '.join(sources)}", where=where)


def check_options(cls: Any, where: str) -> None:
    """Raise `plugin-invalid` if a class cannot hold the options of a part."""
    if not isinstance(cls, type) or not attrs.has(cls):
        raise LuthierError("plugin-invalid", "options must be an attrs class", where=where, found=cls)
    if taken := [f.name for f in attrs.fields(cls) if f.name in RESERVED]:
        remedy = "Rename it: a recipe writes a part as {name: ..., options}."
        raise LuthierError("plugin-invalid", f"no option can be called {taken[0]!r}", where=where, remedy=remedy)


@attrs.frozen(kw_only=True)
class AdapterRecord(Record):
    """The description of an adapter.

    - `mergeable`: True if `merge` can fold the adapter into the weights of the model.
    - `tolerance`: how much the output of the model may change when a fresh adapter is attached, relative to the output.
      0: not by one bit.
    - `artifact`: the folder that `save` fills: "adapter", or "model" for a dense model.
    - `save_dtype`: the dtype that its files need, for a reason that its documentation gives. None: the run's choice.
    """

    kind: ClassVar[str] = "adapter"
    mergeable: bool = True
    tolerance: float = 0.0
    artifact: str = "adapter"
    save_dtype: str | None = None


@attrs.frozen(kw_only=True)
class LossRecord(Record):
    """The description of a loss.

    - `data`: the kind of rows that it takes: "tokens", "preference", "unpaired" or "documents".
    - `columns`: `{name: type}`, columns of a row that it reads as `batch.columns[name]`: "bool", "int" or "float".
    - `documents`: `{name: column}`, further texts of a row that become documents of its unit.
    - `perplexity`: True if the metric `nll`, or else the first term, is in nats per token: its exponential is reported.
    - `aligns`: True if it accepts a teacher or a reference with another vocabulary than the model's.
    - `least_batch`: the fewest units of a global batch from which it learns, because it compares them.
    - `dropout`: False if model and adapter train without dropout, unless the recipe asks for a rate.
    - `reference`: `"module:attribute"` of a second, plainer implementation, with which the conformance kit compares the
      loss: `attribute(options, policy, batch) -> {name: sum}`. None: there is none.
    """

    kind: ClassVar[str] = "loss"
    data: str = "tokens"
    reference: str | None = None
    columns: Mapping[str, str] = attrs.field(factory=dict)
    documents: Mapping[str, str] = attrs.field(factory=dict)
    perplexity: bool = False
    aligns: bool = False
    least_batch: int = 1
    dropout: bool = True


@attrs.frozen(kw_only=True)
class OptimizerRecord(Record):
    """The description of an optimizer."""

    kind: ClassVar[str] = "optimizer"


@attrs.frozen(kw_only=True)
class QuantizerRecord(Record):
    """The description of a quantizer.

    - `bits`: bits per weight, without the scales. None: nothing is quantized.
    - `tolerance`: the largest relative error (Frobenius norm) of a quantized weight.
    - `trains`: True if its layers keep a full-precision weight that is trained. The quantizer then writes and reads the
      trained model.
    - `mergeable`: True if a dense model can be made from its layers. Otherwise `merge: true` is refused.
    """

    kind: ClassVar[str] = "quantizer"
    bits: float | None = None
    tolerance: float = 0.0
    trains: bool = False
    mergeable: bool = True


@attrs.frozen(kw_only=True)
class ProviderRecord(Record):
    """The description of a provider."""

    kind: ClassVar[str] = "provider"


@attrs.frozen(kw_only=True)
class CallbackRecord(Record):
    """The description of a callback."""

    kind: ClassVar[str] = "callback"


@attrs.frozen(kw_only=True)
class OperationRecord(Record):
    """The description of a faster implementation of an operation.

    Unlike other parts it is used as soon as it is installed (`kernels: auto`).

    - `operation`: the operation that it computes, such as "rms_norm".
    - `predicate`: `"module:attribute"`, called before each use with the first argument's properties:
      `attribute(device, dtype, shape) -> bool`. False: this call is left to another implementation.
    - `priority`: of several implementations the one with the highest is used. The core's own have 0.
    - `tolerance`: the largest difference from the reference in values and gradients, relative to the largest number, on
      top of the rounding of the dtype.
    - `needs`: tags of the run, such as "cuda". If one is missing, the operation is not used.
    """

    kind: ClassVar[str] = "operation"
    operation: str
    predicate: str
    priority: int = 1
    tolerance: float = 1e-5

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        where = f"operation record {self.name!r}"
        if self.operation not in OPERATIONS:
            remedy = suggest_nearest(self.operation, OPERATIONS)
            raise LuthierError("plugin-invalid", "there is no such operation", where=where, found=self.operation,
                               remedy=remedy)  # fmt: skip
        if not TARGET.fullmatch(self.predicate):
            problem = "predicate must be 'module:attribute'"
            raise LuthierError("plugin-invalid", problem, where=where, found=self.predicate)
        if self.tolerance < 0:
            raise LuthierError("plugin-invalid", "tolerance must be at least 0", where=where, found=self.tolerance)


@attrs.frozen(kw_only=True)
class ExporterRecord(Record):
    """The description of an exporter, which `luthier export RUN --format NAME` runs.

    - `quantized`: True if it gets the model with the quantizer's layers, as trained, instead of a plain model.
    """

    kind: ClassVar[str] = "exporter"
    quantized: bool = False


@attrs.frozen(kw_only=True)
class MetricRecord(Record):
    """The description of a metric.

    - `over`: "answers" (generated answers and their references) or "tokens" (statistics of the supervised tokens).
    - `wants`: statistics of tokens that it reads besides labels, log-probabilities and weights: "entropy", "top1".
    - `greater_is_better`: True or False, used to choose the best checkpoint. None: neither direction is better.
    """

    kind: ClassVar[str] = "metric"
    over: str = "answers"
    wants: tuple[str, ...] = ()
    greater_is_better: bool | None = True

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        unknown = sorted(set(self.wants) - set(TOKEN_STATISTICS))
        if unknown or (self.wants and self.over != "tokens"):
            problem = "wants may name only 'entropy' and 'top1', in metrics over tokens"
            raise LuthierError("plugin-invalid", problem, where=f"metric record {self.name!r}", found=list(self.wants))


@attrs.frozen(kw_only=True)
class PenaltyRecord(Record):
    """The description of a penalty.

    - `over`: "weights" (the weights that train) or "tokens" (what the policy says of the supervised tokens).
    """

    kind: ClassVar[str] = "penalty"
    over: str = "weights"


@attrs.frozen(kw_only=True)
class TrainerRecord(Record):
    """The description of a trainer.

    - `settings`: the settings of the recipe that the trainer reads itself, such as "max_steps" or "data.max_length".
      The core reads model, data, parts and folders for it, and refuses any other setting by its name.
    """

    kind: ClassVar[str] = "trainer"
    settings: tuple[str, ...] = ()


@attrs.frozen(kw_only=True)
class BenchmarkRecord(Record):
    """The description of a benchmark.

    - `sample`: the name of a task that needs no network, with which the conformance kit tries the benchmark.
    """

    kind: ClassVar[str] = "benchmark"
    sample: str


@attrs.frozen(kw_only=True)
class EngineRecord(Record):
    """The description of an engine, with which `luthier evaluate RUN --engine NAME` has prompts answered."""

    kind: ClassVar[str] = "engine"


RECORDS: Final[dict[str, type[Record]]] = {
    cls.kind: cls
    for cls in (
        *(AdapterRecord, LossRecord, OptimizerRecord, QuantizerRecord, ProviderRecord, CallbackRecord),
        *(OperationRecord, ExporterRecord, MetricRecord, PenaltyRecord, TrainerRecord, BenchmarkRecord, EngineRecord),
    )
}
KINDS: Final = tuple(RECORDS)
