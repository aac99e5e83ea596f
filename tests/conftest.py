"""What the tests of the whole repository share: one torch thread, the real data, a tiny world to train in."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import luthier
import pytest
import torch
from luthier.model.attention import generating_attention
from luthier.testing.worlds import save_tiny_model

sys.path.insert(0, str(Path(__file__).parent))  # the files of errors share `provoking`
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
if "LUTHIER_DATA" not in os.environ and BESIDE.is_dir():
    os.environ["LUTHIER_DATA"] = str(BESIDE)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # tests run side by side on few cores, and tiny tensors are slower with more
# a forked child makes torch's thread pool anew at its first use: threads that load a model would race to make it
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tests neither find nor leave anything in the user's cache."""
    os.environ["LUTHIER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny Llama with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def rows():
    """24 short conversations of several lengths."""

    def row(i):
        question = {"role": "user", "content": f"{i} and {i % 7}?" + "." * (i % 5)}
        return {"messages": [question, {"role": "assistant", "content": f"{i + i % 7}" * (1 + i % 3)}]}

    return [row(i) for i in range(24)]


@pytest.fixture(scope="session")
def data_file(tmp_path_factory, rows):
    """The same rows as a file, for runs that are to be resumed."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def train(model_folder, data_file, tmp_path):
    """`luthier.train` on the tiny Llama in `tmp_path/run`: LoRA on every linear layer, and whatever is changed."""
    settings = {
        "model": str(model_folder),
        "data": str(data_file),
        "adapter": {"name": "lora", "target_modules": "all-linear", "lora_dropout": 0.0},
        "output_dir": tmp_path / "run",
        "exact_callbacks": ["jsonl"],
        "global_batch_size": 8,
        "learning_rate": 1e-2,
    }
    return functools.partial(_train, settings)


def _train(settings, **changes):
    return luthier.train(**{**settings, **changes})


@pytest.fixture(scope="session")
def logits():
    """`logits(model)`: what a model of plain attention gives for fixed tokens, [20, V]."""
    tokens = torch.arange(10, 30)[None]

    def of(model):
        with generating_attention(model):
            return model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0].detach()

    return of


@pytest.fixture
def world(tmp_path, model_folder, monkeypatch):
    """A folder, a model and a command line in which errors are provoked."""
    from provoking import made_world

    with made_world(tmp_path, model_folder, monkeypatch) as made:
        yield made
