"""A run, and its events fired as the engine fires them, for the tests of the callback `tensorboard`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pluggy
import pytest
import torch
from luthier.plugins.events import Events
from luthier.plugins.registry import Plugins
from luthier.runs.writing.active_run import ActiveRun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

torch.set_num_threads(1)

SETTINGS = {"adapter": {"name": "lora", "r": 16}, "learning_rate": 2e-4, "seed": 0}


@pytest.fixture
def run(tmp_path: Path) -> ActiveRun:
    return ActiveRun(run_id="r-1", folder=tmp_path / "run", name="first", settings=SETTINGS, total_steps=9)


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """Build the callback from the installed plugin, and give the hooks of a manager that holds it."""
    plugins = Plugins()
    offer = plugins.get("callback", "tensorboard")

    def start(**options: Any) -> Any:
        manager = pluggy.PluginManager("luthier-events")
        manager.add_hookspecs(Events)
        manager.register(plugins.build(offer, offer.record.options(**options)), "tensorboard")
        manager.check_pending()
        return manager.hook

    return start


@pytest.fixture(scope="session")
def read() -> Callable[[Path], EventAccumulator]:
    """What TensorBoard itself shows of a folder."""
    return lambda folder: EventAccumulator(str(folder)).Reload()


@pytest.fixture(scope="session")
def curve(read: Callable[[Path], EventAccumulator]) -> Callable[[Path, str], dict[int, float]]:
    """The step and value of every point of one scalar; no points where the tag is not there."""

    def curve(folder: Path, tag: str) -> dict[int, float]:
        shown = read(folder)
        points = shown.Scalars(tag) if tag in shown.Tags()["scalars"] else []
        assert len({p.step for p in points}) == len(points), "a step is drawn twice"
        return {p.step: p.value for p in points}

    return curve
