"""Distributions made on the spot: real dist-info folders on sys.path, each with one entry module."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from luthier import LuthierError
from luthier.plugins.registry import Plugins

HEAD = """\
import attrs
from luthier import AdapterRecord, LossRecord, OptimizerRecord, hookimpl, option

@attrs.frozen(kw_only=True)
class Options:
    r: int = option(8, help="Rank.", low=1)

def record(name, kind=OptimizerRecord, **more):
    settings = dict(summary="Made up.", options=Options, build="luthier.builtin.optimizers:FusedAdamW")
    return kind(name=name, **(settings | more))
"""
OFFER = "@hookimpl\ndef luthier_optimizers():\n    return [{}]\n"
number = itertools.count()


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`distribution("luthier-x", body)`: a distribution whose entry module holds `body` below some imports.

    `parts="a b"` offers optimizers of these names instead; `entry_points` is the whole entry_points.txt.
    """
    made: list[str] = []

    def make(
        name: str,
        body: str = "",
        *,
        parts: str = "",
        version: str = "1.2",
        entry_points: str | None = None,
        folder: str = "site",
    ) -> SimpleNamespace:
        site, module = tmp_path / folder, f"made_up_{next(number)}"
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        plugin = name.removeprefix("luthier-")
        (info / "entry_points.txt").write_text(entry_points or f"[luthier]\n{plugin} = {module}\n")
        offered = OFFER.format(", ".join(f'record("{part}")' for part in parts.split()))
        (site / f"{module}.py").write_text(HEAD + (body or offered))
        if str(site) not in sys.path:
            monkeypatch.syspath_prepend(str(site))
        made.append(module)
        return SimpleNamespace(module=module, info=info, site=site)

    yield make
    for module in made:
        sys.modules.pop(module, None)


@pytest.fixture
def refused() -> Any:
    """`refused(plugins, kind, name)`: the error of asking for a part."""

    def ask(plugins: Plugins, name: str, kind: str = "optimizer") -> LuthierError:
        with pytest.raises(LuthierError) as caught:
            plugins.get(kind, name)
        return caught.value

    return ask


@pytest.fixture
def cause() -> Any:
    """`cause(plugins, name)`: why the distribution of this name did not load."""

    def find(plugins: Plugins, name: str) -> str:
        (failure,) = [f for f in plugins.failures if f.source.distribution == name]
        return failure.cause

    return find
