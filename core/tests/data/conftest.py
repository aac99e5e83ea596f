"""Tokenizers under many chat templates, and what a token example supervises, read back by decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from luthier.data.examples import IGNORED, TokenExample
from luthier.data.formats.wanted import TOKENS, Wanted
from luthier.data.prepare import Prepared, prepare_data
from luthier.recipe.schema import Data, Source
from luthier.testing.worlds import tiny_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
TURNS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]


def tokenizer_with(template: str | None) -> Any:
    """The tiny byte tokenizer with a chat template of this folder, and the turn tokens of all of them."""
    text = None if template is None else (TEMPLATES / f"{template}.jinja").read_text()
    tokenizer = tiny_tokenizer(text)
    tokenizer.add_special_tokens({"additional_special_tokens": TURNS})
    return tokenizer


@pytest.fixture(scope="session")
def chat() -> Callable[[str | None], Any]:
    return functools.cache(tokenizer_with)


@pytest.fixture(scope="session")
def made() -> Callable[..., Prepared]:
    """Rows in Python prepared with a tokenizer; the rest are options of `data`."""

    def run(rows: Sequence[Any], tokenizer: Any, *, seed: int = 0, wanted: Wanted = TOKENS, **options: Any) -> Prepared:
        data = Data(train=[Source(path="rows")], **options)
        return prepare_data(data, tokenizer, seed=seed, wanted=wanted, given=rows)

    return run


@pytest.fixture(scope="session")
def from_file() -> Callable[..., Prepared]:
    """A file of rows prepared with a tokenizer; the rest are options of `data`."""

    def run(path: str, tokenizer: Any, **options: Any) -> Prepared:
        return prepare_data(Data(train=[Source(path=path)], **options), tokenizer, seed=0)

    return run


@pytest.fixture(scope="session")
def answers() -> Callable[[TokenExample, Any], list[str]]:
    """The text of each unbroken run of supervised tokens."""

    def read(example: TokenExample, tokenizer: Any) -> list[str]:
        runs: list[list[int]] = []
        before = IGNORED
        for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
            assert label in (token, IGNORED)
            if label != IGNORED:
                runs = [*runs, []] if before == IGNORED else runs
                runs[-1].append(token)
            before = label
        return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]

    return read
