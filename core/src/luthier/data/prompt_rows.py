"""Prompt rows: a recipe's rows as prompts, for a trainer whose answers the policy generates itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final

import attrs
import numpy as np

from luthier.data.formats.forms import Conversation
from luthier.data.formats.recognise_form import FORMATS, convert_row, recognise_format
from luthier.data.formats.wanted import Wanted
from luthier.data.prepare import divide_rows, held_share, validation_supplies
from luthier.data.read.columns import advise_columns, mapped_columns
from luthier.data.read.row import Row
from luthier.data.stream.source_rows import Supply, make_supplies
from luthier.errors import LuthierError
from luthier.recipe.schema import Data

TALKS: Final = ("messages", "sharegpt", "chatml")  # formats whose last answer is what follows the prompt


@attrs.frozen(kw_only=True)
class PromptRow:
    """One prompt (a text or messages), the row's columns, and its place."""

    prompt: str | list[dict[str, Any]]
    columns: dict[str, Any]
    where: str


def read_prompts(
    data: Data, given: Any, given_validation: Any, *, seed: int
) -> tuple[list[PromptRow], list[PromptRow]]:
    """Return the training and the validation prompts of a recipe's rows, or of rows from Python that replace them.

    A row's prompt is its column `prompt`, or what precedes the last answer of its conversation.
    """
    train = _read_supplies(make_supplies(data.train, given, "data", data.text_unit, telling=False))
    validation = _read_supplies(validation_supplies(data, given_validation, telling=False))
    if not validation and held_share(data):
        train_rows, drawn = divide_rows(len(train), held_share(data), seed)
        train, validation = _chosen_rows(train, train_rows), _chosen_rows(train, drawn)
    kinds = {type(row.prompt) for row in (*train, *validation)}
    if len(kinds) > 1:
        problem = "some prompts are plain texts, others are messages"
        raise LuthierError("data-format", problem, where="data.train", remedy="Give rows of one kind.")
    return train, validation


def hash_prompts(rows: Sequence[PromptRow]) -> str:
    """Return 16 hexadecimal digits, a hash of prompts and columns."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.columns], sort_keys=True, default=repr).encode())
    return digest.hexdigest()[:16]


def _chosen_rows(rows: Sequence[PromptRow], places: np.ndarray[Any, Any]) -> list[PromptRow]:
    return [rows[place] for place in places.tolist()]


def _read_supplies(supplies: Sequence[Supply]) -> list[PromptRow]:
    rows = []
    for supply in supplies:
        form = _talk_format(supply)
        rows += [_prompt_row(row.whole, form) for row in supply.rows]
        supply.forget()
    return rows


def _talk_format(supply: Supply) -> str | None:
    """Return the format of a source of conversations; None if its rows have a column `prompt`."""
    rows = [row for row in supply.rows if row.fault is None]
    if all("prompt" in row.values for row in rows):
        return None
    form = recognise_format(rows, supply.source.path, mapped_columns(supply.source), "any")
    if form in TALKS:
        return form
    problem = f"these are {form} rows, which have no prompt"
    remedy = f"Name the column of the prompt: {advise_columns('prompt: question', supply.source.path)}."
    raise LuthierError("data-format", problem, where=supply.source.path, remedy=remedy)


def _prompt_row(row: Row, form: str | None) -> PromptRow:
    if form is None:
        prompt = _checked_prompt(row)
        return PromptRow(prompt=prompt, columns=_without(row, "prompt"), where=row.where)
    talk = convert_row(row, form, Wanted(kind=FORMATS[form].kind))
    assert isinstance(talk, Conversation)  # as the formats of TALKS are
    answers = [place for place, is_trained in enumerate(talk.trained) if is_trained]
    asked = list(talk.messages[: answers[-1]] if answers else talk.messages)
    if not asked:
        raise LuthierError("data-row", "there is no message before its answer", where=row.where)
    return PromptRow(prompt=asked, columns=_without(row, *FORMATS[form].needs[0]), where=row.where)


def _checked_prompt(row: Row) -> str | list[dict[str, Any]]:
    prompt = row.values["prompt"]
    is_talk = isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)
    if is_talk or (isinstance(prompt, str) and prompt):
        return prompt
    remedy = "Give a text, or a list of {role:, content:}."
    raise LuthierError("data-row", "is not a prompt", where=f"{row.where}: prompt", found=prompt, remedy=remedy)


def _without(row: Row, *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.values.items() if name not in names}
