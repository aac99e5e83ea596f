"""The fake cluster, which `server` of the plugins' shared fixtures puts on a port of this machine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_cluster import FakeCluster


@pytest.fixture
def fake():
    return FakeCluster()


@pytest.fixture
def keys():
    return {"CLUSTER_TOKEN": "t0ken-of-the-cluster"}
