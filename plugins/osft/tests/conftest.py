"""A tiny world to train in."""

import functools
import json

import luthier
import pytest
from luthier.testing.worlds import save_tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Llama with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("osft") / "model")


@pytest.fixture(scope="session")
def rows_of(tmp_path_factory):
    """`rows_of(name)`: a file of 24 rows of one of two tasks."""
    folder = tmp_path_factory.mktemp("rows")
    for name, answers in (("one", ("1", "2", "3")), ("two", ("no", "yes", "maybe"))):
        rows = [{"prompt": f"{i} and {i % 4}?", "completion": answers[i % 3]} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda name: str(folder / f"{name}.jsonl")


@pytest.fixture
def train(model_folder, rows_of, tmp_path):
    """`luthier.train` on the tiny Llama in `tmp_path/run`, and whatever is changed; `.settings` are the others."""
    settings = {
        "model": str(model_folder), "data": rows_of("one"), "exact_callbacks": [], "global_batch_size": 4, "max_steps": 4,
        "learning_rate": 1e-2, "memory_check": False, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    run = functools.partial(_train, settings)
    run.settings = settings
    return run


def _train(settings, **changes):
    return luthier.train(**{**settings, **changes})
