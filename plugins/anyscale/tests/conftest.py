"""The fake service, which `server` of the plugins' shared fixtures puts on a port of this machine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_anyscale import FakeAnyscale


@pytest.fixture
def fake():
    return FakeAnyscale()


@pytest.fixture
def keys():
    return {"ANYSCALE_API_KEY": "k"}
