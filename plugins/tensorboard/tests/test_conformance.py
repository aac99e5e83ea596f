"""luthier-tensorboard keeps what every callback must keep."""

import threading

import pytest
from luthier.testing import conformance
from luthier_tensorboard import luthier_callbacks


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """A killed run's writing thread lives on in this process, and would print that its folder is gone."""
    monkeypatch.setattr(threading, "excepthook", lambda met: None)


@conformance(luthier_callbacks())
def test_conforms(check):
    check()
