"""Sound parts that pass every check, and how a broken one is written: a class, the check that must catch it, its words."""

from __future__ import annotations

from typing import Any

import attrs
from luthier.plugins.options import option
from luthier.plugins.records import (
    AdapterRecord,
    BenchmarkRecord,
    CallbackRecord,
    EngineRecord,
    ExporterRecord,
    LossRecord,
    MetricRecord,
    OperationRecord,
    OptimizerRecord,
    PenaltyRecord,
    QuantizerRecord,
    Record,
    TrainerRecord,
)


@attrs.frozen(kw_only=True)
class NllOptions:
    """The sound loss has no options."""


@attrs.frozen(kw_only=True)
class SquaredOptions:
    """Nor has the sound loss that couples the batch."""


@attrs.frozen(kw_only=True)
class PreferenceOptions:
    beta: float = option(0.5, help="Factor of the margin.", low=0.1, high=2.0)


@attrs.frozen(kw_only=True)
class JudgedOptions:
    beta: float = option(0.5, help="Factor of the answer's log-probability.", low=0.1, high=2.0)


@attrs.frozen(kw_only=True)
class CentredOptions:
    """The sound loss that begins has no options."""


@attrs.frozen(kw_only=True)
class LetterOptions:
    letters: int = option(8, help="Letters of the alphabet.", low=2, high=26)


@attrs.frozen(kw_only=True)
class MirrorOptions:
    between: str = option(" ", help="Text between two words.")


@attrs.frozen(kw_only=True)
class LowRankOptions:
    rank: int = option(2, help="Rank of the update.", low=1, high=16)
    scale: float = option(1.5, help="Factor of the update.", low=0.1, high=4.0)
    dropout: float = option(0.1, help="Share of the inputs that training drops.", low=0.0, high=0.9)


@attrs.frozen(kw_only=True)
class MomentumOptions:
    momentum: float = option(0.9, help="Share of the last step that is kept.", low=0.0, high=0.99)
    weight_decay: float = option(0.0, help="L2 decay.", low=0.0)


@attrs.frozen(kw_only=True)
class RowOptions:
    """The sound quantizer has no options."""


@attrs.frozen(kw_only=True)
class TernaryOptions:
    """Nor has the one whose layers are trained."""


@attrs.frozen(kw_only=True)
class CountOptions:
    every: int = option(1, help="Count each so many steps.", low=1)


@attrs.frozen(kw_only=True)
class ArraysOptions:
    compressed: bool = option(False, help="Compress the file.")


@attrs.frozen(kw_only=True)
class PowerOptions:
    weight: float = option(0.1, help="Weight of the sum.", low=1e-3, high=10.0)


@attrs.frozen(kw_only=True)
class ConfidenceOptions:
    weight: float = option(0.1, help="Weight of each square.", low=1e-3, high=10.0)


@attrs.frozen(kw_only=True)
class LikelihoodOptions:
    scale: float = option(1.0, help="Factor of the loss.", low=0.1, high=2.0)


LOSS = LossRecord(
    name="mutant-nll",
    summary="Negative log-likelihood of the supervised tokens.",
    options=NllOptions,
    build="mutants.losses:Nll",
    reference="mutants.losses:reference",
)
COUPLED = attrs.evolve(
    LOSS, name="mutant-squared", build="mutants.losses:Squared", options=SquaredOptions, reference=None
)
PREFERENCE = LossRecord(
    name="mutant-preference",
    summary="Logistic loss of the margin between two answers, against the reference.",
    options=PreferenceOptions,
    build="mutants.preferences:Preference",
    data="preference",
    columns={"margin": "float"},
    needs={"reference"},
)
JUDGED = attrs.evolve(
    PREFERENCE,
    name="mutant-judged",
    build="mutants.preferences:Judged",
    data="unpaired",
    columns={},
    options=JudgedOptions,
)
CENTRED = attrs.evolve(
    LOSS, name="mutant-centred", build="mutants.preferences:Centred", options=CentredOptions, reference=None
)
ADAPTER = AdapterRecord(
    name="mutant-lowrank",
    summary="A low-rank update beside each query and value projection.",
    options=LowRankOptions,
    build="mutants.adapters:LowRank",
    provides={"reference"},
)
OPTIMIZER = OptimizerRecord(
    name="mutant-momentum",
    summary="Gradient descent with momentum.",
    options=MomentumOptions,
    build="mutants.optimizers:Momentum",
)
PROBING = attrs.evolve(OPTIMIZER, name="mutant-probing", build="mutants.optimizers:Probing", needs="closure")
QUANTIZER = QuantizerRecord(
    name="mutant-rows",
    summary="Int8 codes with a scale for each row.",
    options=RowOptions,
    build="mutants.quantizers:Rows",
    bits=8,
    tolerance=0.02,
    provides={"quantized-base"},
)
TERNARY = QuantizerRecord(
    name="mutant-ternary",
    summary="Ternary weights that are trained through a straight-through estimator.",
    options=TernaryOptions,
    build="mutants.ternary:Ternary",
    bits=1.58,
    tolerance=0.6,
    trains=True,
    provides={"dense-weights"},
)
CALLBACK = CallbackRecord(
    name="mutant-count",
    summary="Counts the steps of a run.",
    options=CountOptions,
    build="mutants.callbacks:Count",
)
OPERATION = OperationRecord(
    name="mutant-swiglu",
    summary="The gated activation by its formula.",
    operation="swiglu",
    build="mutants.operations:build_swiglu",
    predicate="mutants.operations:fits",
)
FROZEN_HEAD = OperationRecord(
    name="mutant-head",
    summary="The head by its formula, for frozen weights alone.",
    operation="token_logprobs",
    build="mutants.operations:build_frozen_head",
    predicate="mutants.operations:fits",
    tolerance=2**-7,  # of products rounded to bfloat16
)
EXPORTER = ExporterRecord(
    name="mutant-arrays",
    summary="Every weight as an array of numpy.",
    options=ArraysOptions,
    build="mutants.exporters:Arrays",
)
EXACT = MetricRecord(
    name="mutant-exact",
    summary="Share of answers that are the reference, word for word.",
    build="mutants.metrics:Exact",
    over="answers",
)
SURPRISE = MetricRecord(
    name="mutant-surprise",
    summary="Weighted mean of the negative log-probabilities.",
    build="mutants.metrics:Surprise",
    over="tokens",
    wants=("entropy",),
    greater_is_better=False,
)
PENALTY = PenaltyRecord(
    name="mutant-squares",
    summary="The weighted sum of squares.",
    options=PowerOptions,
    build="mutants.penalties:Squares",
    needs={"trainable-weights"},
)
TOKEN_PENALTY = PenaltyRecord(
    name="mutant-confidence",
    summary="The weighted square of each token's log-probability.",
    options=ConfidenceOptions,
    build="mutants.token_penalties:Confidence",
    over="tokens",
)
TRAINER = TrainerRecord(
    name="mutant-likelihood",
    summary="Makes the words of each prompt likelier.",
    options=LikelihoodOptions,
    build="mutants.trainers:Likelihood",
    needs={"trainable-weights"},
    settings=("max_steps", "learning_rate", "data.max_length"),
)
BENCHMARK = BenchmarkRecord(
    name="mutant-letters",
    summary="Guesses the next letter of the alphabet.",
    options=LetterOptions,
    build="mutants.benchmarks:Letters",
    sample="letters",
)
ENGINE = EngineRecord(
    name="mutant-mirror",
    summary="Says the words of a prompt backwards.",
    options=MirrorOptions,
    build="mutants.engines:Mirror",
)
SIDES = (OPERATION, FROZEN_HEAD, EXPORTER, EXACT, SURPRISE, PENALTY, TOKEN_PENALTY, TRAINER, BENCHMARK, ENGINE)
SOUND: tuple[Record, ...] = (
    LOSS,
    COUPLED,
    PREFERENCE,
    JUDGED,
    CENTRED,
    ADAPTER,
    OPTIMIZER,
    QUANTIZER,
    TERNARY,
    CALLBACK,
    *SIDES,
)


@attrs.frozen(kw_only=True)
class Mutant:
    """A broken part, the check that is named for its fault, and a piece of what that check must say."""

    record: Record
    caught_by: str
    says: str

    @property
    def id(self) -> str:
        return f"{self.record.build.partition(':')[2]}-{self.caught_by}"


def broken(sound: Record, attribute: str, caught_by: str, says: str, **changes: Any) -> Mutant:
    """A mutant that differs from a sound part by the class it is built of, and perhaps by what its record says."""
    module = sound.build.partition(":")[0]
    return Mutant(record=attrs.evolve(sound, build=f"{module}:{attribute}", **changes), caught_by=caught_by, says=says)
