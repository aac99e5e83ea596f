"""The check that the ids of a dataset are ids of the model, and the ids that end an answer."""

from __future__ import annotations

from typing import Any

import numpy as np

from luthier.data.examples import IGNORED, TokenDataset
from luthier.errors import LuthierError


def check_token_ids(dataset: TokenDataset, tokenizer: Any, vocab_size: int) -> None:
    """Raise `model-vocabulary` with the row's place if an id or label is negative or not below `vocab_size`."""
    for ids in (dataset.input_ids, np.where(dataset.labels == IGNORED, 0, dataset.labels)):
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(wrong):
            raise _outside(dataset, int(wrong[0]), int(ids[wrong[0]]), tokenizer, vocab_size)


def _outside(dataset: TokenDataset, at: int, token: int, tokenizer: Any, vocab_size: int) -> LuthierError:
    row = int(np.searchsorted(dataset.starts, at, side="right")) - 1
    text = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
    said = "" if text is None else f" ({text!r})"
    problem = f"token {token}{said} is not among the model's {vocab_size} embeddings"
    remedy = f"Use the model's own tokenizer: this one has {len(tokenizer)} tokens."
    return LuthierError("model-vocabulary", problem, where=dataset[row].where or None, remedy=remedy)


def stop_tokens(dataset: TokenDataset, tokenizer: Any) -> tuple[int, ...]:
    """Return the special tokens that supervised spans end with, the most frequent first."""
    on = dataset.labels != IGNORED
    last = np.append(~on[1:], True) if len(on) else on
    last[dataset.firsts[1:] - 1] = True
    ended, counts = np.unique(dataset.input_ids[on & last], return_counts=True)
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    return tuple(int(ended[i]) for i in np.argsort(-counts, kind="stable") if int(ended[i]) in special)
