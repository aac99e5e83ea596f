"""A tiny saved model, a few conversations, and a way to train on them in a temporary folder."""

import functools

import luthier
import pytest
from luthier.testing.worlds import save_tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def rows():
    def row(i):
        question = {"role": "user", "content": f"{i} and {i % 7}?" + "." * (i % 5)}
        return {"messages": [question, {"role": "assistant", "content": f"{i + i % 7}" * (1 + i % 3)}]}

    return [row(i) for i in range(24)]


@pytest.fixture
def train(model_folder, rows, tmp_path):
    """`luthier.train` on the tiny model in `tmp_path/run`, quietly, with whatever is changed."""
    settings = {
        "model": str(model_folder),
        "data": rows,
        "output_dir": tmp_path / "run",
        "callbacks": ["jsonl"],
        "global_batch_size": 8,
        "learning_rate": 1e-2,
    }
    return functools.partial(_train, settings)


def _train(settings, **changes):
    return luthier.train(**{**settings, **changes})
