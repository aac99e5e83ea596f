"""The fake service, which `server` of the plugins' shared fixtures puts on a port of this machine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_openai import FakeOpenAI


@pytest.fixture
def fake():
    return FakeOpenAI()


@pytest.fixture
def keys():
    return {"OPENAI_API_KEY": "k"}
