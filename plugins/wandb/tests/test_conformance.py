"""luthier-wandb keeps what every callback must keep."""

import pytest
from luthier.testing import conformance
from luthier_wandb import luthier_callbacks


@pytest.fixture(autouse=True)
def offline(fresh, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


@conformance(luthier_callbacks(), vary=False)  # another mode would ask for a key
def test_conforms(check):
    check()
