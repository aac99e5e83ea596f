"""What the recipe's tests share: a registry of the core's parts and of made-up ones, and a minimal recipe."""

from __future__ import annotations

import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import attrs
import luthier.builtin
import pytest
from luthier import AdapterRecord, CallbackRecord, QuantizerRecord, hookimpl, option
from luthier.plugins.registry import Plugins, Source


class Side(enum.Enum):
    LEFT = "left"
    RIGHT = "right"


@attrs.frozen(kw_only=True)
class Inner:
    depth: int = option(2, help="An option of an option.", low=1, high=9)


@attrs.frozen(kw_only=True)
class Many:
    """An option of every type that options have."""

    r: int = option(8, help="Rank.", low=1, high=512)
    lora_alpha: int = option(16, help="Scale.", low=1)
    dropout: float = option(0.05, help="Share.", low=0.0, high=0.99)
    bias: bool = option(False, help="Switch.")
    form: Literal["core", "factored"] = option("core", help="Form.")
    solver: str = option("svd", help="Solver.", choices=("svd", "qr"))
    target_modules: str | list[str] | None = option(None, help="Layers.")
    pair: tuple[float, float] = option((0.9, 0.95), help="Two.", low=0.0, high=1.0)
    words: tuple[str, ...] = option((), help="Any number.")
    names: frozenset[str] = option(frozenset(), help="A set.")
    ranks: dict[str, int] = option(factory=dict, help="By name.", low=1)
    limit: float | None = option(None, help="Or none.", low=0.0)
    steps: int | Literal["auto"] = option("auto", help="Or auto.")
    folder: Path | None = option(None, help="A path.")
    side: Side = option(Side.LEFT, help="An enumeration.")
    inner: Inner = option(factory=Inner, help="Nested.")
    label: str = option("", help="Text.")
    extra: dict[str, Any] = option(factory=dict, help="Anything.")


@attrs.frozen(kw_only=True)
class Osft:
    unfreeze_rank_ratio: float = option(help="Share that trains.", low=0.0, high=1.0)


@attrs.frozen(kw_only=True)
class Lora:
    r: int = option(8, help="Rank.", low=1)
    lora_alpha: int = option(16, help="Scale.", low=1)
    lora_dropout: float = option(0.0, help="Dropout.", low=0.0, high=0.99)
    target_modules: str | list[str] | None = option(None, help="Layers.")


@attrs.frozen(kw_only=True)
class Dora(Lora):
    pass


@attrs.frozen(kw_only=True)
class Nf4:
    pass


@attrs.frozen(kw_only=True)
class Watcher:
    run_name: str | None = option(None, help="Name.")
    every: int = option(1, help="Steps.", low=1)


def adapter(name: str, options: Any) -> AdapterRecord:
    return AdapterRecord(name=name, summary="Made up.", options=options, build="luthier.builtin.full:FullTuning")


@hookimpl
def luthier_adapters() -> list[AdapterRecord]:
    named = {"many": Many, "osft": Osft, "lora": Lora, "dora": Dora}
    return [adapter(name, options) for name, options in named.items()]


@hookimpl
def luthier_quantizers() -> list[QuantizerRecord]:
    return [QuantizerRecord(name="nf4", summary="Made up.", options=Nf4, build="luthier.builtin.none:Unquantized")]


@hookimpl
def luthier_callbacks() -> list[CallbackRecord]:
    return [CallbackRecord(name="watch", summary="Made up.", options=Watcher, build="luthier.builtin.jsonl:JsonLines")]


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    """The core's parts, and made-up ones."""
    registry = Plugins(autoload=False)
    registry.register(
        luthier.builtin, Source(plugin="builtin", module="luthier.builtin", distribution="luthier", version="1")
    )
    own = SimpleNamespace(
        luthier_adapters=luthier_adapters, luthier_quantizers=luthier_quantizers, luthier_callbacks=luthier_callbacks
    )
    registry.register(own, Source(plugin="own", module="own", distribution="luthier-own", version="0.3"))
    assert not registry.failures
    return registry


@pytest.fixture(scope="session")
def options() -> SimpleNamespace:
    """The made-up options classes."""
    return SimpleNamespace(Many=Many, Osft=Osft, Lora=Lora, Dora=Dora, Nf4=Nf4, Watcher=Watcher, Inner=Inner, Side=Side)


@pytest.fixture
def least() -> dict[str, Any]:
    """The least that a recipe says."""
    return {"model": "demo", "data": "rows.jsonl"}


@pytest.fixture
def make(plugins: Plugins, least: dict[str, Any]) -> Any:
    """`make(adapter="lora", ...)`: a recipe of the least and these settings."""
    from luthier.recipe import Recipe

    return lambda **settings: Recipe.from_dict({**least, **settings}, plugins=plugins)


@pytest.fixture
def wrong(make: Any) -> Any:
    """`wrong(adapter={...})`: the error of a recipe."""
    from luthier import LuthierError

    def error(**settings: Any) -> LuthierError:
        with pytest.raises(LuthierError) as caught:
            make(**settings)
        return caught.value

    return error


@pytest.fixture
def file(tmp_path: Path) -> Any:
    """`file("a.yaml", text)`: a recipe file in a folder of its own."""

    def written(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return written


@pytest.fixture
def read(plugins: Plugins) -> Any:
    """`read(path, flags, environ)`: a reading with the made-up parts."""
    from luthier.recipe import load_recipe as reading
    from luthier.recipe import parse_flags

    def given(path: Path | None = None, flags: str | list[str] = (), environ: dict[str, str] | None = None) -> Any:
        words = flags.split() if isinstance(flags, str) else list(flags)
        return reading(path, parse_flags(words), environ=environ or {}, plugins=plugins)

    return given
