"""The fake service, which `server` of the plugins' shared fixtures puts on a port of this machine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_vertex import FakeVertex


@pytest.fixture
def fake():
    return FakeVertex()


@pytest.fixture
def keys():
    return {"TOKEN": "ya29.tests"}
