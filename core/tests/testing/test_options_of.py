"""Options drawn from their metadata: inside what is declared, the default first, nothing invented."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from luthier.errors import LuthierError
from luthier.plugins.options import option
from luthier.testing import expect_error, options_of

FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@attrs.frozen(kw_only=True)
class Inner:
    depth: int = option(1, help="How deep.", low=0, high=3)


@attrs.frozen(kw_only=True)
class Everything:
    rank: int = option(8, help="Bounded below.", low=1)
    share: float = option(0.1, help="Bounded.", low=0.0, high=0.5)
    free: float = option(2.0, help="Without bounds.")
    decay: float | None = option(None, help="Optional.", low=0.0, high=1.0)
    mode: Literal["min", "max"] = option("min", help="A literal.")
    kind: str = option("a", help="Choices.", choices=("a", "b", "c"))
    flag: bool = option(False, help="A switch.")
    betas: tuple[float, float] = option((0.9, 0.99), help="A pair.", low=0.0, high=0.999)
    layers: list[int] | None = option(None, help="Numbers.", low=0, high=5)
    sizes: list[int] = option(factory=lambda: [3, 4], help="As many as there are.", low=2, high=9)
    size: int | Literal["auto"] = option("auto", help="A number or a word.", low=1, high=4)
    inner: Inner = option(factory=Inner, help="Options of their own.")
    name: str = option("x", help="Text.")
    folder: Path = option(Path("here"), help="A path.")
    table: dict[str, int] = option(factory=dict, help="A mapping.")
    targets: str | list[str] | None = option(None, help="Text, texts or none.")
    anything: Any = option(None, help="Anything.")


@FEW
@given(options_of(Everything))
def test_every_value_is_inside_its_bounds_choices_and_type(drawn):
    assert attrs.evolve(drawn) == drawn  # the class's own validators have passed it
    assert 1 <= drawn.rank <= 32
    assert 0.0 <= drawn.share <= 0.5
    assert len(drawn.sizes) == 2


@FEW
@given(options_of(Everything))
def test_text_paths_and_mappings_keep_their_default(drawn):
    assert (drawn.name, drawn.folder, drawn.table, drawn.targets, drawn.anything) == ("x", Path("here"), {}, None, None)


@pytest.mark.parametrize(
    "condition",
    [
        lambda o: o.rank > 8,
        lambda o: o.share == 0.5,
        lambda o: o.share == 0.0 and o.rank != 8,
        lambda o: o.decay is not None and o.decay > 0,
        lambda o: o.mode == "max",
        lambda o: o.kind == "c",
        lambda o: o.flag,
        lambda o: o.betas != (0.9, 0.99),
        lambda o: o.layers is not None and len(o.layers) > 1,
        lambda o: o.sizes[0] == 2,
        lambda o: o.size == 4,
        lambda o: o.inner.depth == 3,
        lambda o: o.free < 0,
    ],
    ids=[
        "rank",
        "edge-high",
        "edge-low",
        "optional",
        "literal",
        "choices",
        "flag",
        "pair",
        "list",
        "sizes",
        "union",
        "nested",
        "free",
    ],
)
def test_what_is_declared_is_reached(condition):
    search = settings(max_examples=3000, derandomize=True, database=None, phases=(Phase.generate,))
    assert condition(find(options_of(Everything), condition, settings=search))


def test_the_first_options_are_the_default():
    seen = []

    @settings(max_examples=5, derandomize=True, database=None, deadline=None)
    @given(options_of(Everything))
    def look(drawn):
        seen.append(drawn)

    look()
    assert seen[0] == Everything()


def test_the_same_options_are_drawn_each_time():
    def draw():
        seen = []

        @settings(max_examples=20, derandomize=True, database=None, deadline=None)
        @given(options_of(Everything))
        def look(drawn):
            seen.append(drawn)

        look()
        return seen

    assert draw() == draw()


@FEW
@given(options_of(Everything, [Everything(name="mine", rank=3)]))
def test_an_example_lends_its_text_to_what_is_drawn(drawn):
    assert drawn.name in ("x", "mine")


def test_an_example_itself_is_drawn():
    mine = Everything(name="mine", rank=3)
    assert find(options_of(Everything, [mine]), lambda o: o == mine) == mine


def test_required_numbers_and_choices_are_invented():
    @attrs.frozen(kw_only=True)
    class Required:
        steps: int = option(help="Required.", low=2)
        mode: Literal["a", "b"] = option(help="Required.")
        share: float | None = option(help="Required.", low=0.5, high=1.0)

    found = find(options_of(Required), lambda o: True)
    assert (found.steps, found.mode, found.share) == (2, "a", 0.5)


def test_required_text_asks_for_an_example():
    @attrs.frozen(kw_only=True)
    class Named:
        project: str = option(help="Required.")

    with expect_error("plugin-invalid", "Named", "examples=[Named(project=") as caught:
        options_of(Named)
    assert caught.value.code == "plugin-invalid"
    mine = Named(project="mine")
    assert find(options_of(Named, [mine]), lambda o: True) == mine


def test_combinations_that_the_class_refuses_are_not_drawn():
    @attrs.frozen(kw_only=True)
    class Ordered:
        low: int = option(0, help="Lower.", low=0, high=9)
        high: int = option(9, help="Higher.", low=0, high=9)

        def __attrs_post_init__(self):
            if self.low > self.high:
                raise LuthierError("recipe-conflict", "low is above high")

    with pytest.raises(NoSuchExample):
        find(options_of(Ordered), lambda o: o.low > o.high, settings=settings(max_examples=200, database=None))
    assert find(options_of(Ordered), lambda o: o.low > 3).low > 3


def test_options_without_fields_have_one_value():
    @attrs.frozen(kw_only=True)
    class Nothing:
        """No options."""

    assert find(options_of(Nothing) | st.nothing(), lambda o: True) == Nothing()
