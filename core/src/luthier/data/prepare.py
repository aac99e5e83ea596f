"""Preparing: a recipe's rows, read, recognised, split, rendered and tokenised, everything counted."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final

import attrs
import numpy as np

from luthier.data.cache import Entry
from luthier.data.examples import TokenDataset
from luthier.data.make import Maker
from luthier.data.recognise import convert_row, recognise
from luthier.data.remarks import repeated
from luthier.data.report import Report, formats_of
from luthier.data.rows import Row
from luthier.data.sets import Progress, making
from luthier.data.stream import Stream, stream_of
from luthier.data.supply import Supply, supplies
from luthier.data.vocabulary import check_vocabulary, stop_tokens
from luthier.errors import LuthierError
from luthier.recipe.tree import Data, Source

BLOCKED: Final = ("text", "tokens")  # formats that are cut into blocks

__all__ = ["Prepared", "Report", "check_vocabulary", "prepare"]


@attrs.frozen(kw_only=True)
class Prepared:
    """Examples ready for packing (TokenDatasets), or pairs of kind "preference"."""

    train: Any  # TokenDataset, Stream, or a tuple of PreferenceExample
    validation: Any | None
    report: Report
    chat_template: str | dict[str, str] | None = None  # what was used, to be saved with the tokenizer
    chat_template_hash: str | None = None
    stop_tokens: tuple[int, ...] = ()  # ids that supervised spans end with, for the generation config


def prepare(
    data: Data,
    tokenizer: Any,
    *,
    seed: int,
    kind: str = "tokens",
    given: Any = None,
    given_validation: Any = None,
    progress: Progress | None = None,
) -> Prepared:
    """The training and validation examples of `data`, deterministic in `seed`, or an error with file and line.

    `given` and `given_validation` are rows in Python or `datasets` objects in the place of the recipe's sources. `kind`
    is what the loss takes, "tokens" or "preference"; "any", for looking at rows, is whichever the first source holds.
    """
    if data.streaming:  # its own tokenizer, for another thread may read it
        return _streamed(data, Maker.of(data, copy.deepcopy(tokenizer)), kind, given, given_validation, progress)
    maker, telling = Maker.of(data, tokenizer), data.cache and kind == "tokens"
    train = supplies(data.train, given, "data", data.text_unit, telling=telling)
    held = _validation(data, given_validation, telling=telling)
    share, place = _share(data), None
    if telling:
        drawn = [share, seed] if share and not held else None
        place = Entry.of(data, {"train": train, "validation": held}, tokenizer, maker.template, drawn=drawn)
    sets = None if place is None else place.read()
    if sets is None:
        sets = _made(data, train, held, maker, seed=seed, kind=kind, progress=progress)
        if place is not None:
            place.write(sets)
    return _prepared(*sets, maker)


def _streamed(
    data: Data, maker: Maker, kind: str, given: Any, given_validation: Any, progress: Progress | None
) -> Prepared:
    """A stream of training rows, and the validation rows in memory."""
    if _share(data):
        problem, remedy = "a stream has no share to hold back", "Give validation its own file."
        raise LuthierError("recipe-conflict", problem, where="data.validation", remedy=remedy)
    if kind == "preference":
        problem, remedy = "pairs are not streamed", "Leave data.streaming out."
        raise LuthierError("part-unsupported", problem, where="data.streaming", remedy=remedy)
    stream, validation = stream_of(data, maker, _form_of_tokens, given), None
    forms, name = read_forms(data, _validation(data, given_validation, telling=False), kind)
    if forms:
        with making(maker, len(forms), progress) as line:
            validation, stream.report.validation = line.make(forms, name, kind)
    return _prepared(stream, validation, stream.report, maker)


def _made(
    data: Data,
    train: Sequence[Supply],
    held: Sequence[Supply],
    maker: Maker,
    *,
    seed: int,
    kind: str,
    progress: Progress | None,
) -> Any:
    """The training set, the validation set or None, and the report of both."""
    forms, name = read_forms(data, train, kind)
    others, other_name = read_forms(data, held, kind) if held else (None, "")
    if others is None:
        forms, others = _divided(forms, _share(data), seed)
    validation = None
    with making(maker, len(forms) + len(others or ()), progress) as line:
        examples, report = line.make(forms, name, kind)
        if others is not None:
            validation, report.validation = line.make(others, other_name or name, kind)
            report.warnings += repeated(examples, validation)
    return examples, validation, report


def _prepared(train: Any, validation: Any, report: Report, maker: Maker) -> Prepared:
    template, tokenizer = maker.template, maker.encoder.tokenizer
    ended = train.sample if isinstance(train, Stream) else train
    return Prepared(
        train=train,
        validation=validation,
        report=report,
        chat_template=None if template is None else template.source,
        chat_template_hash=None if template is None else template.hash,
        stop_tokens=stop_tokens(ended, tokenizer) if isinstance(ended, TokenDataset) else (),
    )


def read_forms(data: Data, given: Sequence[Supply], kind: str) -> tuple[list[Any], str]:
    """Every row of the supplies as its format's form, and the formats' names."""
    forms: list[Any] = []
    names = []
    for supply in given:
        form = form_of(data, supply.rows, supply.source)
        if kind == "any":
            kind = "preference" if form == "preference" else "tokens"
        _check_kind(form, kind, supply.source.path)
        forms += [convert_row(row, form) for row in supply.rows]
        names.append(form)
        supply.forget()
    return forms, formats_of(names)


def form_of(data: Data, rows: Sequence[Row], source: Source) -> str:
    """The format of a source: the recipe's, or what its rows look like."""
    form: str = data.format
    if form == "auto":
        form = recognise(rows, source.path, {*source.columns, *source.template})
    if data.block_size is not None and form not in BLOCKED:
        problem = f"blocks are made of {' and '.join(BLOCKED)}, and these are {form} rows"
        remedy = "Leave block_size out, or give documents."
        raise LuthierError("recipe-conflict", problem, where="data.block_size", remedy=remedy)
    return form


def _form_of_tokens(data: Data, rows: Sequence[Row], source: Source) -> str:
    form = form_of(data, rows, source)
    _check_kind(form, "tokens", source.path)
    return form


def _check_kind(form: str, kind: str, where: str) -> None:
    if (form == "preference") == (kind == "preference"):
        return
    if form == "preference":
        problem, remedy = "these are preference pairs, but the loss takes tokens", "Choose a loss for pairs."
    else:
        problem = f"these are {form} rows, but the loss takes preference pairs"
        remedy = "Give rows with chosen and rejected, or choose another loss."
    raise LuthierError("data-format", problem, where=where, remedy=remedy)


def _validation(data: Data, given: Any, *, telling: bool) -> list[Supply]:
    sources = data.validation if isinstance(data.validation, list) else []
    if given is None and not sources:
        return []
    return supplies(sources, given, "eval_data", data.text_unit, telling=telling)


def _share(data: Data) -> float:
    share = data.validation
    if isinstance(share, list) or 0 <= share <= 0.5:
        return 0.0 if isinstance(share, list) else share
    raise LuthierError("recipe-out-of-range", "a share is from 0 to 0.5", where="data.validation", found=share)


def _divided(forms: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any] | None]:
    """Rows for training and for validation, at least one of each, both in their order."""
    if not share:
        return forms, None
    if len(forms) < 2:
        problem = "one row cannot be divided into training and validation"
        raise LuthierError("data-empty", problem, where="data.validation", remedy="Give validation its own file.")
    count = min(max(1, round(share * len(forms))), len(forms) - 1)
    held = set(np.random.default_rng(seed).permutation(len(forms))[:count].tolist())
    return [f for i, f in enumerate(forms) if i not in held], [f for i, f in enumerate(forms) if i in held]
