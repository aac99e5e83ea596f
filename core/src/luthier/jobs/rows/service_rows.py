"""The recipe's rows in the few forms that services know: conversations, completions, texts and preference pairs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, Final

from luthier.data.formats.documents import alpaca_conversation
from luthier.data.formats.forms import Completion, Conversation, Document, Instruction, Pair
from luthier.data.formats.recognise_form import SAMPLE, convert_row, recognise_format
from luthier.data.read.columns import mapped_columns
from luthier.data.read.sources import read_source
from luthier.data.source_shares import are_plain
from luthier.errors import LuthierError
from luthier.plugins.providing.job_records import ServiceRow
from luthier.recipe.schema import Data, Source

PAIRED: Final = "preference"


def training_rows(data: Data, method_pairs: bool, seed: int) -> Iterator[ServiceRow]:
    """Yield the rows to train on, without a share that is held back for validation."""
    held_out = _held_rows(data, seed)
    for index, row in enumerate(_read_rows(data, data.train, method_pairs)):
        if index not in held_out:
            yield row


def validation_rows(data: Data, method_pairs: bool, seed: int) -> Iterator[ServiceRow]:
    """Yield the rows to evaluate on: those of the validation sources, or the share that is held back."""
    if isinstance(data.validation, list):
        yield from _read_rows(data, data.validation, method_pairs)
        return
    held_out = _held_rows(data, seed)
    for index, row in enumerate(_read_rows(data, data.train, method_pairs)) if held_out else ():
        if index in held_out:
            yield row


def _held_rows(data: Data, seed: int) -> frozenset[int]:
    """Return the indices of the rows that are held back.

    They are drawn by the seed, but differ from those of a run here.
    """
    share = data.validation
    if isinstance(share, list) or not share:
        return frozenset()
    count = sum(1 for source in data.train for _ in read_source(source, data.text_unit))
    if count < 2:
        raise LuthierError("data-empty", "one row cannot be divided", where="data.validation")
    number = min(max(1, round(share * count)), count - 1)
    return frozenset(random.Random(seed).sample(range(count), number))


def _read_rows(data: Data, sources: list[Source], method_pairs: bool) -> Iterator[ServiceRow]:
    if not are_plain(sources):
        problem, remedy = "a service reads a file of rows as it is: no share, repeat or weight", "Leave them out."
        raise LuthierError("recipe-conflict", problem, where="data.train", remedy=remedy)
    for source in sources:
        rows = read_source(source, data.text_unit)
        first = list(islice(rows, SAMPLE))
        form = data.format
        if form == "auto":
            kind = PAIRED if method_pairs else "tokens"
            form = recognise_format(first, source.path, mapped_columns(source), kind)  # type: ignore[assignment]
        _check_form(form, method_pairs, source.path)
        for row in chain(first, rows):
            yield _form_row(convert_row(row, form), row.where)


def _check_form(form: str, method_pairs: bool, where: str) -> None:
    if form in ("tokens", "unpaired", "documents"):
        raise LuthierError(
            "data-format", f"a service takes conversations or text, and these are {form} rows", where=where
        )
    if (form == PAIRED) != method_pairs:
        problem = "these are preference pairs, but the loss takes plain rows" if form == PAIRED else (
            f"these are {form} rows, but the loss takes preference pairs"
        )  # fmt: skip
        raise LuthierError("data-format", problem, where=where, remedy="Choose another loss, or other rows.")


def _pair_row(pair: Pair, where: str) -> ServiceRow:
    """Return a pair as messages: a text prompt becomes the user's message, a text answer the assistant's."""
    before = [{"role": "user", "content": pair.prompt}] if isinstance(pair.prompt, str) else pair.prompt
    better, worse = (
        [{"role": "assistant", "content": side}] if isinstance(side, str) else side
        for side in (pair.chosen, pair.rejected)
    )
    return ServiceRow(
        form=PAIRED, where=where, messages=tuple(before), chosen=tuple(better), rejected=tuple(worse), tools=pair.tools
    )


def _form_row(form: Any, where: str) -> ServiceRow:
    _check_carried(form, where)
    if isinstance(form, Instruction):
        form = alpaca_conversation(form)
    if isinstance(form, Pair):
        return _pair_row(form, where)
    if isinstance(form, Conversation):
        return ServiceRow(
            form="conversation", where=where, messages=form.messages, trained=form.trained, tools=form.tools
        )
    if isinstance(form, Completion):
        return ServiceRow(form="completion", where=where, prompt=form.prompt, text=form.completion)
    assert isinstance(form, Document)
    return ServiceRow(form="text", where=where, text=form.text)


def _check_carried(form: Any, where: str) -> None:
    """Raise `data-row` if a row says something that a service's file cannot hold."""
    flags = form.flags if isinstance(form, Conversation) else ()
    wrong = next((flag for flag in flags if flag not in (None, 0.0, 1.0)), None)
    if wrong is not None or form.weight != 1.0:
        weight = form.weight if wrong is None else wrong
        raise LuthierError("data-row", "a service takes no weights but 0 and 1", where=where, found=weight)
    if form.settings:
        problem = "a service's chat template takes no chat_template_kwargs"
        raise LuthierError("data-row", problem, where=where, found=dict(form.settings))


def completion_conversation(row: ServiceRow) -> ServiceRow:
    """Return a completion as a conversation of a question and an answer, for a service without completions."""
    messages = ({"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.text})
    return ServiceRow(form="conversation", where=row.where, messages=messages, trained=(False, True))


def wire_row(row: ServiceRow, *, weights: bool) -> dict[str, Any]:
    """Return a row in OpenAI's format, which several services share.

    With `weights`, a message of the assistant that is not trained on gets the weight 0.
    """
    if row.form == PAIRED:
        return {
            "input": {"messages": _wire_messages(row.messages), **({"tools": row.tools} if row.tools else {})},
            "preferred_output": _wire_messages(row.chosen),
            "non_preferred_output": _wire_messages(row.rejected),
        }
    if row.form == "completion":
        return {"prompt": row.prompt, "completion": row.text}
    if row.form == "text":
        return {"text": row.text}
    messages = _wire_messages(row.messages)
    for message, on in zip(messages, row.trained, strict=True):
        if weights and message["role"] == "assistant" and not on:
            message["weight"] = 0
    return {"messages": messages, **({"tools": row.tools} if row.tools else {})}


def _wire_messages(messages: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """Return messages with tool arguments as JSON text, and without empty content beside tool calls."""
    return [_wire_message(message) for message in messages]


def _wire_message(message: dict[str, Any]) -> dict[str, Any]:
    calls = [_wire_call(call, number) for number, call in enumerate(message.get("tool_calls") or ())]
    fields = {k: v for k, v in message.items() if k not in ("tool_calls", "content")}
    content = {} if calls and not message.get("content") else {"content": message["content"]}
    return {**fields, **content, **({"tool_calls": calls} if calls else {})}


def _wire_call(call: dict[str, Any], number: int) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": call.get("id") or f"call_{number}", "type": "function",
            "function": {"name": call["function"]["name"], "arguments": text}}  # fmt: skip
