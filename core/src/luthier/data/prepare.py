"""Preparing: a recipe's rows, read, recognised, split, rendered and tokenised, everything counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from luthier.data.examples import TokenDataset
from luthier.data.make import Maker, Progress
from luthier.data.read import read_given, read_source
from luthier.data.recognise import convert_row, recognise
from luthier.data.remarks import repeated
from luthier.data.report import Report, formats_of
from luthier.data.rows import Row
from luthier.data.vocabulary import check_vocabulary, stop_tokens
from luthier.errors import LuthierError
from luthier.recipe.tree import Data, Source

__all__ = ["Prepared", "Report", "check_vocabulary", "prepare"]


@attrs.frozen(kw_only=True)
class Prepared:
    """Examples ready for packing (TokenDatasets), or pairs of kind "preference"."""

    train: Any  # TokenDataset, or a tuple of PreferenceExample
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
    train, name = read_forms(data, data.train, given, "data", kind)
    held, held_name = _validation(data, given_validation, kind)
    if held is None:
        train, held = _divided(train, _share(data), seed)
    maker = Maker.of(data, tokenizer, progress, len(train) + len(held or ()))
    examples, report = maker.make(train, name, kind)
    validation = None
    if held is not None:
        validation, report.validation = maker.make(held, held_name or name, kind)
        report.warnings += repeated(examples, validation)
    return _prepared(examples, validation, report, maker)


def _prepared(train: Any, validation: Any, report: Report, maker: Maker) -> Prepared:
    template, tokenizer = maker.template, maker.encoder.tokenizer
    return Prepared(
        train=train,
        validation=validation,
        report=report,
        chat_template=template and template.source,
        chat_template_hash=template and template.hash,
        stop_tokens=stop_tokens(train, tokenizer) if isinstance(train, TokenDataset) else (),
    )


def read_forms(data: Data, sources: Sequence[Source], given: Any, name: str, kind: str) -> tuple[list[Any], str]:
    """Every row of the sources as its format's form, and the formats' names."""
    forms: list[Any] = []
    names = []
    for rows, source in _read(data, sources, given, name):
        mapped = {*source.columns, *source.template}
        form = recognise(rows, source.path, mapped) if data.format == "auto" else data.format
        if kind == "any":
            kind = "preference" if form == "preference" else "tokens"
        _check_kind(form, kind, source.path)
        forms += [convert_row(row, form) for row in rows]
        names.append(form)
    return forms, formats_of(names)


def _read(data: Data, sources: Sequence[Source], given: Any, name: str) -> list[tuple[list[Row], Source]]:
    if given is not None:
        source = sources[0] if len(sources) == 1 else Source(path=name)
        source = attrs.evolve(source, path=name)
        rows = list(read_given(given, name, source))
        found = [(rows, source)]
    else:
        found = [(list(read_source(source, data.text_unit)), source) for source in sources]
    for rows, source in found:
        if not rows:
            raise LuthierError("data-empty", "there are no rows", where=source.path)
    if not found:
        raise LuthierError("data-empty", "no source of rows is given", where="data.train")
    return found


def _check_kind(form: str, kind: str, where: str) -> None:
    if (form == "preference") == (kind == "preference"):
        return
    if form == "preference":
        problem, remedy = "these are preference pairs, but the loss takes tokens", "Choose a loss for pairs."
    else:
        problem = f"these are {form} rows, but the loss takes preference pairs"
        remedy = "Give rows with chosen and rejected, or choose another loss."
    raise LuthierError("data-format", problem, where=where, remedy=remedy)


def _validation(data: Data, given: Any, kind: str) -> tuple[list[Any] | None, str]:
    sources = data.validation if isinstance(data.validation, list) else []
    if given is None and not sources:
        return None, ""
    return read_forms(data, sources, given, "eval_data", kind)


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
