"""The fake server, which `server` of the plugins' shared fixtures puts on a port of this machine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_skypilot import FakeSkypilot


@pytest.fixture
def fake():
    return FakeSkypilot()


@pytest.fixture
def keys():
    return {"SKYPILOT_TOKEN": "t0ken-of-the-server"}
