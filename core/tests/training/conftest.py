"""Two small tasks on the embedded model, as files."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests share `child_process`


@pytest.fixture
def task_files(tmp_path):
    def write(name, answer):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{name} {i}?", "completion": answer(i)} for i in range(12)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return {
        "first": write("first", lambda i: f"{i % 3}."),
        "second": write("second", lambda i: "yes" if i % 2 else "no"),
    }


@pytest.fixture
def recipe_file(tmp_path, task_files):
    """A recipe of two tasks beside their files."""
    path = tmp_path / "continual.yaml"
    path.write_text(
        "model: demo\n"
        "data: {validation: 0.25, max_length: 64}\n"
        "adapter: {name: full}\n"
        "exact_callbacks: [jsonl]\n"
        "learning_rate: 1e-3\n"
        "global_batch_size: 4\n"
        "max_steps: 3\n"
        "memory_check: false\n"
        "output_dir: out\n"
        "tasks:\n"
        "  - {name: first, data: first.jsonl}\n"
        "  - {name: second, data: {train: [second.jsonl]}, max_steps: 2}\n"
    )
    return path


@pytest.fixture
def data(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
