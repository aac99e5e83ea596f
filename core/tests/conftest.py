"""What every test of the core shares: one torch thread, a tiny saved model with rows to train on, and the real data sets."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import luthier
import pytest

BESIDE = Path(__file__).resolve().parents[2].parent / "shared" / "data"
if "LUTHIER_DATA" not in os.environ and BESIDE.is_dir():
    os.environ["LUTHIER_DATA"] = str(BESIDE)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests run side by side on few cores; an environment without torch has no threads to limit."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither find nor leave anything in the user's cache."""
    os.environ["LUTHIER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`processor("avx512_bf16")` gives this machine a processor with these features."""
    from luthier.hardware import low_precision

    def set_features(*names: str) -> None:
        path = tmp_path / f"cpuinfo-{'-'.join(names)}"
        path.write_text(f"processor\t: 0\nflags\t\t: fpu {' '.join(names)}\n")
        monkeypatch.setattr(low_precision, "CPUINFO", path)

    return set_features


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("LUTHIER_DATA", ""))
    if not os.environ.get("LUTHIER_DATA") or not folder.is_dir():
        pytest.skip("no real data: set LUTHIER_DATA to the folder of data sets")
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer."""
    from luthier.testing.worlds import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """24 short conversations of several lengths."""

    def row(i: int) -> dict[str, Any]:
        question = {"role": "user", "content": f"{i} and {i % 7}?" + "." * (i % 5)}
        return {"messages": [question, {"role": "assistant", "content": f"{i + i % 7}" * (1 + i % 3)}]}

    return [row(i) for i in range(24)]


@pytest.fixture
def train(model_folder: Path, rows: list[dict[str, Any]], tmp_path: Path) -> Any:
    """`luthier.train` on the tiny model in `tmp_path/run`, quietly, with whatever is changed."""
    settings = {
        "model": str(model_folder),
        "data": rows,
        "output_dir": tmp_path / "run",
        "exact_callbacks": ["jsonl"],
        "global_batch_size": 8,
        "learning_rate": 1e-2,
    }
    return functools.partial(_train, settings)


def _train(settings: dict[str, Any], **changes: Any) -> Any:
    return luthier.train(**{**settings, **changes})
