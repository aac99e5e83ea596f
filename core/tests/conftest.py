"""What every test of the core shares: one torch thread, and the real data sets where they are."""

from __future__ import annotations

import os
from pathlib import Path

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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("LUTHIER_DATA", ""))
    if not os.environ.get("LUTHIER_DATA") or not folder.is_dir():
        pytest.skip("no real data: set LUTHIER_DATA to the folder of data sets")
    return folder
