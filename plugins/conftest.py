"""The fixtures that the tests of every provider share: a server, a manager, and small files of rows."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from luthier import Manager
from luthier.testing import VirtualClock
from luthier.testing.loopback import LoopbackServer


@pytest.fixture
def server(fake: Any) -> Iterator[LoopbackServer]:
    """The service that the plugin's own `fake` imitates, for the provider and for the vendor's SDK alike."""
    made = LoopbackServer(fake.answer)
    fake.url = made.url
    with made.running():
        yield made


@pytest.fixture
def keys() -> Mapping[str, str]:
    """The keys that a provider reads, by their variables; each plugin gives its own."""
    return {}


@pytest.fixture
def manager(tmp_path: Path, keys: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """A manager with a store of its own, whose waits take no time, where the provider's keys are set."""
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    made = Manager(tmp_path / "store", clock=VirtualClock())
    yield made
    made.close()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """The path of a file of twelve conversations."""
    turns = [(("user", f"{i}?"), ("assistant", f"{2 * i}")) for i in range(12)]
    lines = [{"messages": [{"role": role, "content": text} for role, text in pair]} for pair in turns]
    return write_lines(tmp_path / "rows.jsonl", lines)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """The path of a file of twelve preference pairs."""
    lines = [{"prompt": f"{i}?", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}"} for i in range(12)]
    return write_lines(tmp_path / "pairs.jsonl", lines)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Write one JSON object per line, and return the path."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
