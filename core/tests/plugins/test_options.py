"""Options classes: strict when made, described for people, and records that keep what they promise."""

from typing import Any, Literal

import attrs
import pytest
from luthier import (
    AdapterRecord,
    BenchmarkRecord,
    CallbackRecord,
    EngineRecord,
    ExporterRecord,
    LossRecord,
    LuthierError,
    MetricRecord,
    OperationRecord,
    OptimizerRecord,
    PenaltyRecord,
    ProviderRecord,
    QuantizerRecord,
    TrainerRecord,
    option,
)
from luthier.plugins.completion import REQUIRED
from luthier.plugins.hookspecs import HOOKS
from luthier.plugins.options import describe_options, is_default, type_name
from luthier.plugins.records import KINDS, RECORDS, TAGS


@attrs.frozen(kw_only=True)
class Options:
    r: int = option(8, help="Rank.", low=1, high=64)
    alpha: float = option(16, help="Scale.", low=0.0)
    names: list[str] = option(factory=lambda: ["q_proj"], help="Layers.")
    pair: tuple[float, float] = option((0.9, 0.95), help="Two.", low=0.0, high=1.0)
    solver: str = option("svd", help="Solver.", choices=("svd", "qr"))
    solvers: list[str] = option(factory=list, help="Solvers.", choices=("svd", "qr"))
    mode: Literal["min", "max"] | None = option(None, help="Mode.")
    needed: bool = option(help="Required.")


def test_values_are_structured_when_an_object_is_made():
    made = Options(alpha="2e-1", names=("a", "b"), pair=[0, 1], needed=True)
    assert (made.alpha, made.names, made.pair) == (0.2, ["a", "b"], (0.0, 1.0))
    assert type(made.pair[0]) is float
    assert Options(alpha=3, needed=True) == Options(alpha=3.0, needed=True)


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        ({"r": "8"}, "recipe-wrong-type", ("Options.r", "'8'")),
        ({"r": 0}, "recipe-out-of-range", ("Options.r", "0", "1", "64")),
        ({"r": 65}, "recipe-out-of-range", ("Options.r",)),
        ({"alpha": -1}, "recipe-out-of-range", ("Options.alpha", "0.0")),
        ({"pair": (0.5, 2)}, "recipe-out-of-range", ("Options.pair", "2.0")),
        ({"solver": "eig"}, "recipe-out-of-range", ("Options.solver", "'eig'")),
        ({"solvers": ["svd", "eig"]}, "recipe-out-of-range", ("Options.solvers", "'eig'")),
        ({"names": "q_proj"}, "recipe-wrong-type", ("Options.names", "'q_proj'")),
        ({"mode": "mid"}, "recipe-wrong-type", ("Options.mode", "'min'", "'max'", "'mid'")),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_refused_when_an_object_is_made(given, code, says):
    with pytest.raises(LuthierError) as caught:
        Options(needed=True, **given)
    assert caught.value.code == code
    assert all(fact in str(caught.value) for fact in says)


def test_two_objects_share_no_list():
    given = ["a"]
    made = Options(names=given, needed=True)
    given.append("b")
    assert made.names == ["a"]
    assert Options(needed=True).names is not Options(needed=True).names


def test_options_are_described_for_people():
    described = {d.name: d for d in describe_options(Options)}
    assert list(described) == ["r", "alpha", "names", "pair", "solver", "solvers", "mode", "needed"]
    assert (described["r"].type, described["r"].default, described["r"].bounds.low) == ("int", 8, 1)
    assert described["names"].default == ["q_proj"]
    assert (described["needed"].required, described["r"].required) == (True, False)
    assert described["mode"].type == "'min' | 'max' | none"
    assert described["solver"].bounds.choices == ("svd", "qr")


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "int"), (float | None, "float | none"), (list[str], "list[str]"), (dict[str, int], "dict[str, int]"),
        (tuple[int, ...], "tuple[int, ...]"), (str | list[str] | None, "str | list[str] | none"), (Any, "Any"),
        (Literal["a", 1], "'a' | 1"), (Options, "{needed: ...}"),
    ],
)  # fmt: skip
def test_types_are_written_as_people_write_them(hint, text):
    assert type_name(hint) == text


@attrs.frozen(kw_only=True)
class Picky:
    a: bool = option(False, help="One.")
    pair: tuple[float, ...] = option((1, 2), help="Numbers, given as ints.")

    def __attrs_post_init__(self):
        if not self.a:
            raise LuthierError("recipe-missing", "needs a", where="a")


def test_defaults_are_recognised():
    assert not is_default(Options(needed=True))
    assert not is_default(Picky(a=True))

    @attrs.frozen(kw_only=True)
    class Plain:
        pair: tuple = option((1, 2), help="Numbers.")

    assert is_default(Plain())
    assert is_default(Plain(pair=[1, 2]))
    assert not is_default(Plain(pair=(1, 3)))


VALID = {"name": "own", "summary": "Made up.", "options": Options, "build": "own.module:Part"}


@attrs.frozen(kw_only=True)
class Named:
    name: str = option("x", help="Taken.")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "Own"}, ("adapter record 'Own'",)),
        ({"name": ""}, ("adapter record ''",)),
        ({"name": "a b"}, ("adapter record 'a b'",)),
        ({"summary": ""}, ("adapter record 'own'",)),
        ({"summary": "a\nb"}, ("adapter record 'own'",)),
        ({"build": "own.module"}, ("adapter record 'own'", "'module:attribute'", "'own.module'")),
        ({"build": "own.module:a.b"}, ("adapter record 'own'", "'module:attribute'")),
        ({"options": "own.module"}, ("adapter record 'own'", "'module:attribute'")),
        ({"options": dict}, ("adapter record 'own'",)),
        ({"options": Options(needed=True)}, ("adapter record 'own'",)),
        ({"options": Named}, ("adapter record 'own'", "'name'")),
        ({"needs": "quantised-base"}, ("adapter record 'own'", "'quantised-base'", "'quantized-base'")),
        ({"provides": ["packing", "own"]}, ("adapter record 'own'",)),
        ({"conflicts": {"own:"}}, ("adapter record 'own'", "'own:'")),
        ({"conflicts": {":tag"}}, ("adapter record 'own'", "':tag'")),
        ({"needs": "packing, cuda"}, ("adapter record 'own'",)),
    ],
    ids=str,
)
def test_a_malformed_record_is_refused_by_its_name(change, says):
    with pytest.raises(LuthierError) as caught:
        AdapterRecord(**(VALID | change))
    assert caught.value.code == "plugin-invalid"
    assert str(caught.value).startswith("adapter record ")
    assert all(fact in str(caught.value) for fact in says)


def test_a_sound_record_keeps_its_tags():
    record = AdapterRecord(**VALID, needs="dense-weights", provides=["own:tag", "reference"], conflicts=())
    assert (record.needs, record.provides) == (frozenset({"dense-weights"}), frozenset({"own:tag", "reference"}))
    assert record.conflicts == frozenset()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        record.name = "other"


def test_every_kind_has_a_record_a_hook_and_a_protocol():
    records = (AdapterRecord, LossRecord, OptimizerRecord, QuantizerRecord, ProviderRecord, CallbackRecord)
    records += (
        OperationRecord,
        ExporterRecord,
        MetricRecord,
        PenaltyRecord,
        TrainerRecord,
        BenchmarkRecord,
        EngineRecord,
    )
    assert set(RECORDS.values()) == set(records)
    assert set(KINDS) == set(HOOKS) == set(REQUIRED)
    assert len(TAGS) == 13
