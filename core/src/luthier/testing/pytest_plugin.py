"""A pytest plugin for an author's own tests: one torch thread, as the kit's checks have by themselves.

Tiny tensors are many times slower on several threads. It is not registered as an entry point, which would change every
test session of an environment that Luthier is installed in: ask for it with `-p luthier.testing.pytest_plugin`, or
with `pytest_plugins = ["luthier.testing.pytest_plugin"]` in the conftest.py beside pyproject.toml.
"""

from __future__ import annotations

import os
import sys

import pytest

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def pytest_configure() -> None:
    """A torch that is imported later starts with one thread; what the environment says already wins."""
    for name in VARIABLES:
        os.environ.setdefault(name, "1")


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """A torch that is imported already is set to one thread; one that is not stays so."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
