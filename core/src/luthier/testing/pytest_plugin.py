"""A pytest plugin for an author's own tests: it sets one torch thread, as the kit's checks do by themselves.

Tiny tensors are many times slower on several threads. It is not registered as an entry point, which would change every
test session of an environment with Luthier: ask for it with `-p luthier.testing.pytest_plugin`, or with
`pytest_plugins = ["luthier.testing.pytest_plugin"]` in the conftest.py beside pyproject.toml.
"""

from __future__ import annotations

import os
import sys

import pytest

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def pytest_configure() -> None:
    """Let a torch that is imported later start with one thread, unless the environment sets a number."""
    for name in VARIABLES:
        os.environ.setdefault(name, "1")


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Set a torch that is imported already to one thread. It does not import torch."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
