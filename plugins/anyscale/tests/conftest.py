"""The fake service on a server of this machine, for the provider and for the vendor's SDK alike."""

import json
import sys
from pathlib import Path

import pytest
from luthier.testing.loopback import LoopbackServer

sys.path.insert(0, str(Path(__file__).parent))
from fake_anyscale import FakeAnyscale


@pytest.fixture
def fake():
    return FakeAnyscale()


@pytest.fixture
def server(fake):
    made = LoopbackServer(fake.answer)
    with made.running():
        yield made


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{2 * i}"}]}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
