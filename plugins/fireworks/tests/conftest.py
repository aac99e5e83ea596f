"""The fake service, which `server` of the plugins' shared fixtures puts on a port of this machine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_fireworks import FakeFireworks


@pytest.fixture
def fake():
    return FakeFireworks()


@pytest.fixture
def keys():
    return {"FIREWORKS_API_KEY": "k"}
