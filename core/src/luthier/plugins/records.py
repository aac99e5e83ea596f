"""Records: frozen plain data by which a plugin describes the parts that it offers, without importing them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import attrs

from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins.contracts.operation_names import OPERATIONS

TAGS: Final = frozenset(
    (
        "dense-weights",
        "quantized-base",
        "rounded-activations",
        "trainable-weights",
        "reference",
        "paired-data",
        "unpaired-data",
        "calibration-data",
        "teacher",
        "packing",
        "cuda",
        "multi-rank",
        "closure",
    )
)
OWN_TAG: Final = re.compile(r"[a-z0-9][a-z0-9_.\-]*:[a-z0-9][a-z0-9_.\-]*")
RESERVED: Final = ("name", "local")  # a recipe's own keys beside a part's options
NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.\-]*")
METRIC_SOURCES: Final = ("answers", "tokens")
TOKEN_STATISTICS: Final = ("entropy", "top1")
TARGET: Final = re.compile(r"[\w.]+:\w+")


def as_tags(value: Any, where: str) -> frozenset[str]:
    """Return one tag or several as a set.

    Raises `plugin-invalid` for a tag that is neither the core's nor written `name:tag`.
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
    """The options class of a part that has no options."""


@attrs.frozen(kw_only=True)
class Record:
    """The description of one part. `build` is `"module:attribute"`, called once as `attribute(options) -> part`.

    `options` is a frozen attrs class of `option()` fields, or a lazy `"module:attribute"` that gives one. A part
    without options leaves it out. `needs` lists tags that another chosen part, the data, the model or the device must
    provide; `conflicts` lists tags that none of them may provide. A plugin's own tag is written `name:tag`.
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
            raise LuthierError("plugin-invalid", "a name is lower-case letters, digits, '.', '-' and '_'", where=where)
        if not self.summary or "\n" in self.summary:
            raise LuthierError("plugin-invalid", "the summary is one line", where=where, found=self.summary)
        if not TARGET.fullmatch(self.build):
            raise LuthierError("plugin-invalid", "build is 'module:attribute'", where=where, found=self.build)
        if isinstance(self.options, str):
            if not TARGET.fullmatch(self.options):
                raise LuthierError("plugin-invalid", "lazy options are 'module:attribute'", where=where)
        else:
            check_options(self.options, where)
        as_tags(self.needs | self.provides | self.conflicts, where)


def check_options(cls: Any, where: str) -> None:
    """Raise `plugin-invalid` if a class cannot hold a part's options."""
    if not isinstance(cls, type) or not attrs.has(cls):
        raise LuthierError("plugin-invalid", "options is an attrs class", where=where, found=cls)
    taken = [f.name for f in attrs.fields(cls) if f.name in RESERVED]
    if taken:
        remedy = "Rename it: a recipe writes a part as {name: ..., options}."
        raise LuthierError("plugin-invalid", f"no option can be called {taken[0]!r}", where=where, remedy=remedy)


@attrs.frozen(kw_only=True)
class AdapterRecord(Record):
    """The description of an adapter. `tolerance` bounds how far a fresh attach may move the model's output, relative to
    it (0: bit for bit).

    `artifact` names the folder that `save` fills: "adapter", or "model" for a dense model. `save_dtype` is the dtype
    that its files need ("float32", ...), with the reason in the part's documentation; None leaves it to the run.
    """

    kind: ClassVar[str] = "adapter"
    mergeable: bool = True
    tolerance: float = 0.0
    artifact: str = "adapter"
    save_dtype: str | None = None


@attrs.frozen(kw_only=True)
class LossRecord(Record):
    """The description of a loss. `data` is the kind of rows it takes: "tokens", "preference", "unpaired" or
    "documents".

    `columns = {name: type}` lists the row's columns that it needs in the batch (types: "bool", "int", "float").
    `documents = {name: column}` lists further texts of the row that become documents of its unit. `perplexity` says
    that the main term is in nats per token. `aligns` says that the loss takes a teacher or a reference whose vocabulary
    differs from the model's. `reference` is a `"module:attribute"` that the conformance kit compares the loss with:
    `attribute(options, policy, batch) -> {name: sum}`, as plain as can be.
    """

    kind: ClassVar[str] = "loss"
    data: str = "tokens"
    reference: str | None = None
    columns: Mapping[str, str] = attrs.field(factory=dict)
    documents: Mapping[str, str] = attrs.field(factory=dict)
    perplexity: bool = False
    aligns: bool = False


@attrs.frozen(kw_only=True)
class OptimizerRecord(Record):
    kind: ClassVar[str] = "optimizer"


@attrs.frozen(kw_only=True)
class QuantizerRecord(Record):
    """The description of a quantizer. `bits` counts the bits of a weight without scales; None if nothing is quantized.

    `tolerance` bounds the relative (Frobenius) error of a weight after quantization. `trains` says that the layers
    keep a latent weight that is trained; the artifact is then written and read through the quantizer. `mergeable`
    says that a dense model can be made of its layers, with an adapter or without; if False, `merge: true` is refused.
    """

    kind: ClassVar[str] = "quantizer"
    bits: float | None = None
    tolerance: float = 0.0
    trains: bool = False
    mergeable: bool = True


@attrs.frozen(kw_only=True)
class ProviderRecord(Record):
    kind: ClassVar[str] = "provider"


@attrs.frozen(kw_only=True)
class CallbackRecord(Record):
    kind: ClassVar[str] = "callback"


@attrs.frozen(kw_only=True)
class OperationRecord(Record):
    """The description of a faster form of one of the engine's operations. It alone among parts is active once installed
    (`kernels: auto`).

    `operation` is what it computes ("rms_norm", ...). `predicate` is a `"module:attribute"`, asked before a call as
    `attribute(device, dtype, shape) -> bool` about the first argument. Of several forms the one with the highest
    `priority` is taken; the core's own forms have 0. `tolerance` bounds the difference to the reference, in values and
    gradients, relative to the largest number and beyond the rounding of the dtype. `needs` holds tags of the run, such
    as "cuda"; if one is missing, the form is left out.
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
            raise LuthierError("plugin-invalid", "predicate is 'module:attribute'", where=where, found=self.predicate)
        if self.tolerance < 0:
            raise LuthierError("plugin-invalid", "tolerance is at least 0", where=where, found=self.tolerance)


@attrs.frozen(kw_only=True)
class ExporterRecord(Record):
    """The description of an exporter: a format of another tool, written by `luthier export RUN --format NAME`.

    `quantized` says that it gets the layers of the run's quantizer as they were trained, instead of a plain model.
    """

    kind: ClassVar[str] = "exporter"
    quantized: bool = False


@attrs.frozen(kw_only=True)
class MetricRecord(Record):
    """The description of a metric. `over` is "answers" (generated texts, compared with references) or "tokens"
    (statistics of the evaluation's forward pass).

    `wants` names the statistics of tokens that it reads besides labels, log-probabilities and weights: "entropy",
    "top1". `greater_is_better` says which direction is better; None if neither is.
    """

    kind: ClassVar[str] = "metric"
    over: str = "answers"
    wants: tuple[str, ...] = ()
    greater_is_better: bool | None = True

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        where = f"metric record {self.name!r}"
        if self.over not in METRIC_SOURCES:
            raise LuthierError("plugin-invalid", "over is 'answers' or 'tokens'", where=where, found=self.over)
        unknown = sorted(set(self.wants) - set(TOKEN_STATISTICS))
        if unknown or (self.wants and self.over != "tokens"):
            problem = "wants is for metrics over tokens: 'entropy', 'top1'"
            raise LuthierError("plugin-invalid", problem, where=where, found=list(self.wants))


@attrs.frozen(kw_only=True)
class PenaltyRecord(Record):
    """The description of a penalty: a function of the trained weights that is added to any loss's objective."""

    kind: ClassVar[str] = "penalty"


@attrs.frozen(kw_only=True)
class TrainerRecord(Record):
    """The description of a trainer: another library's loop, which takes every step of a run instead of Luthier's own.

    `settings` names the settings of the run that it reads, such as "max_steps" or "data.max_length". The core reads
    the model, the data, the parts and the folders for it; a recipe that sets any other setting is refused by its name.
    """

    kind: ClassVar[str] = "trainer"
    settings: tuple[str, ...] = ()


RECORDS: Final[dict[str, type[Record]]] = {
    cls.kind: cls
    for cls in (
        AdapterRecord,
        LossRecord,
        OptimizerRecord,
        QuantizerRecord,
        ProviderRecord,
        CallbackRecord,
        OperationRecord,
        ExporterRecord,
        MetricRecord,
        PenaltyRecord,
        TrainerRecord,
    )
}
KINDS: Final = tuple(RECORDS)
