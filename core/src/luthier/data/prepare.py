"""Preparation: a recipe's rows are read, recognised, split, rendered and tokenised, and everything is counted."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Final

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.cache import Entry, Sets
from luthier.data.examples import TokenDataset
from luthier.data.formats.bad_rows import Fault, check_policy, faults_error, settle_faults
from luthier.data.formats.message_roles import named_roles
from luthier.data.formats.read_rows import ReadRows
from luthier.data.formats.recognise_form import FORMATS, first_rows, recognise_format
from luthier.data.formats.remarks import remark_repeated
from luthier.data.formats.row_kinds import check_row_kind
from luthier.data.formats.wanted import TOKENS, Wanted
from luthier.data.line_sets import add_read, find_lines
from luthier.data.read.columns import mapped_columns
from luthier.data.read.line_blocks import LinesRefused
from luthier.data.read.row import Row
from luthier.data.report import Report
from luthier.data.sets import Making, Progress, making_rows
from luthier.data.source_shares import check_shares, is_mixed
from luthier.data.stream.row_stream import Stream, stream_of
from luthier.data.stream.source_rows import Supply, make_supplies
from luthier.data.tokenise.examples_of_rows import Made, Maker
from luthier.data.tokenise.vocabulary import check_token_ids, stop_tokens
from luthier.data.tokenise.workers import cut_chunks
from luthier.errors import LuthierError
from luthier.recipe.schema import Data, Source

WITHOUT_ROLES: Final = ("text", "tokens", "preference", "unpaired", "documents")  # a comparison trains its answers
BLOCKED: Final = ("text", "tokens")  # formats that can be cut into blocks
MadeRows = tuple[ReadRows, Iterable[Made]]  # what was read, and what is made of it, in parts
__all__ = ["Prepared", "Report", "check_token_ids", "prepare_data"]


@attrs.frozen(kw_only=True)
class Prepared:
    """Examples ready for packing, each one unit."""

    train: TokenDataset | Stream
    validation: TokenDataset | None
    report: Report
    chat_template: str | dict[str, str] | None = None  # the template that was used, to be saved with the tokenizer
    chat_template_hash: str | None = None
    stop_tokens: tuple[int, ...] = ()  # ids at the end of supervised spans, for the generation config


def prepare_data(
    data: Data, tokenizer: Any, *, seed: int, wanted: Wanted = TOKENS, given: Any = None,
    given_validation: Any = None, progress: Progress | None = None,
) -> Prepared:  # fmt: skip
    """Return the training and validation examples of `data`, deterministic in `seed`. Errors name file and line.

    `given` and `given_validation` are rows from Python, or `datasets` objects, that replace the recipe's sources.
    `wanted` is what the loss demands of rows.
    """
    _check_settings(data)
    if data.streaming:  # its own tokenizer, because another thread may read it
        return _streamed(data, Maker.of(data, copy.deepcopy(tokenizer)), wanted, given, given_validation, progress)
    maker, telling = Maker.of(data, tokenizer), data.cache
    train = make_supplies(data.train, given, "data", data.text_unit, telling=telling)
    validation = validation_supplies(data, given_validation, telling=telling)
    share, place = held_share(data), None
    if telling:
        others = {
            "drawn": [share, seed] if share and not validation else None,
            "mixed": seed if is_mixed(data.train) else None,
            "wanted": attrs.asdict(wanted),
        }
        place = Entry.of(data, {"train": train, "validation": validation}, tokenizer, maker.template, others)
    sets = None if place is None else place.read()
    if sets is None:
        sets = _made(data, train, validation, maker, seed=seed, wanted=wanted, progress=progress)
        if place is not None:
            place.write(sets)
    return _prepared(*sets, maker)


def _check_settings(data: Data) -> None:
    """Raise for settings of bad rows, or of shares of sources, that contradict each other."""
    check_policy(data)
    check_shares(data.train)
    if isinstance(data.validation, list) and is_mixed(data.validation):
        problem, remedy = "share and repeat are for training rows", "Leave them out."
        raise LuthierError("recipe-conflict", problem, where="data.validation", remedy=remedy)


def _streamed(
    data: Data, maker: Maker, wanted: Wanted, given: Any, given_validation: Any, progress: Progress | None
) -> Prepared:
    """Return a stream of training rows, and the validation rows in memory."""
    if held_share(data):
        problem, remedy = "a stream has no share to hold back", "Give validation its own file."
        raise LuthierError("recipe-conflict", problem, where="data.validation", remedy=remedy)
    stream, validation = stream_of(data, maker, form_of, wanted, given), None
    read = read_forms(data, validation_supplies(data, given_validation, telling=False), wanted)
    if read.forms:
        with making_rows(maker, len(read.forms), progress) as line:
            validation, stream.report.validation = line.make(read)
    return _prepared(stream, validation, stream.report, maker)


def _made(
    data: Data,
    train: Sequence[Supply],
    validation_rows: Sequence[Supply],
    maker: Maker,
    *,
    seed: int,
    wanted: Wanted,
    progress: Progress | None,
) -> Sets:
    """Return the training set, the validation set or None, and the report on both."""
    if validation_rows or not held_share(data):
        sets = made_of_lines(data, (train, validation_rows), maker, seed=seed, wanted=wanted, progress=progress)
        if sets is not None:
            return sets
    read = read_forms(data, train, wanted)
    others = read_forms(data, validation_rows, wanted)
    if not validation_rows and held_share(data):
        if len(read.forms) < 2:
            settle_faults(read.faults, read.count, data)  # what the rows lack, before what cannot be made of them
        train_rows, drawn = divide_rows(len(read.forms), held_share(data), seed)
        read, others = read.chosen(train_rows, faults=True), read.chosen(drawn, faults=False)
    with making_rows(maker, len(read.forms) + len(others.forms), progress) as line:
        parts, other_parts = (line.made(cut_chunks(rows.forms)) for rows in (read, others))
        return _settled(line, (read, parts), (others, other_parts) if others.forms else None, seed)


def _settled(line: Making, train: MadeRows, validation: MadeRows | None, seed: int) -> Sets:
    examples, report = line.settle(*train, seed)
    others = None
    if validation is not None:
        others, report.validation = line.settle(*validation)
        report.warnings += remark_repeated(examples, others)
    return examples, others, report


def made_of_lines(
    data: Data,
    supplies: tuple[Sequence[Supply], Sequence[Supply]],
    maker: Maker,
    *,
    seed: int,
    wanted: Wanted,
    progress: Progress | None,
) -> Sets | None:
    """Return what `_made` returns, of files whose rows the processes read themselves; None if that cannot be done."""
    lines = [find_lines(data, given, wanted, form_of) for given in supplies]
    train, validation = lines
    if train is None or validation is None:
        return None
    with making_rows(maker, sum(source.num_lines for source in (*train, *validation)), progress) as line:
        made = line.made(part for source in (*train, *validation) for part in source.parts())
        read, others = ReadRows(), ReadRows()
        try:
            parts, other_parts = add_read(train, made, read), add_read(validation, made, others)
            return _settled(line, (read, parts), (others, other_parts) if validation else None, seed)
        except LinesRefused:
            return None
        except LuthierError:
            if not validation:
                raise
            return None  # an error of reading the validation rows would come first


def _prepared(train: Any, validation: Any, report: Report, maker: Maker) -> Prepared:
    template, tokenizer = maker.template, maker.encoder.tokenizer
    ended = train.sample if isinstance(train, Stream) else train
    return Prepared(
        train=train,
        validation=validation,
        report=report,
        chat_template=None if template is None else template.source,
        chat_template_hash=None if template is None else template.hash,
        stop_tokens=stop_tokens(ended, tokenizer),
    )


def read_forms(data: Data, given: Sequence[Supply], wanted: Wanted) -> ReadRows:
    """Return every row of the supplies in its format's form."""
    read = ReadRows()
    for supply in given:
        rows = supply.read_once()
        first = first_rows(rows)
        form = form_of(data, first, supply.source, wanted)
        if wanted.kind == "any":
            wanted = attrs.evolve(wanted, kind=FORMATS[form].kind)
        read.add(itertools.chain(first, rows), form, wanted, supply.source)
        supply.forget()
    return read


def form_of(data: Data, rows: Sequence[Row], source: Source, wanted: Wanted) -> str:
    """Return a source's format, given by the recipe or recognised by its first rows.

    Raises `data-format` if the loss does not take it.
    """
    form: str = data.format
    if all(row.fault is not None for row in rows):
        raise faults_error([Fault.of(row.fault) for row in rows if row.fault is not None], len(rows))
    if form == "auto" or wanted.kind == "documents":
        form = recognise_format(rows, source.path, mapped_columns(source), wanted.kind)
    check_row_kind(form, wanted.kind, source.path, rows)
    _check_form(form, data, source, wanted)
    return form


def _check_form(form: str, data: Data, source: Source, wanted: Wanted) -> None:
    """Raise `recipe-conflict` for settings that rows of this format, or the loss that takes them, cannot follow."""
    if data.block_size is not None and form not in BLOCKED:
        problem = f"blocks are made of {' and '.join(BLOCKED)} rows, but these are {form} rows"
        remedy = "Leave block_size out, or give documents."
        raise LuthierError("recipe-conflict", problem, where="data.block_size", remedy=remedy)
    if named_roles(data.train_on) and form in WITHOUT_ROLES:
        problem = f"it names roles, and {form} rows have none that it could choose among"
        remedy = "Set train_on: assistant, last or all."
        raise LuthierError("recipe-conflict", problem, where="data.train_on", found=data.train_on, remedy=remedy)
    is_weighted = source.weight != 1.0
    if data.block_size is not None and (is_weighted or "weight" in mapped_columns(source)):
        problem, remedy = (
            "a block joins rows, so a row cannot have its own weight",
            "Leave weight or block_size out.",
        )
        raise LuthierError("recipe-conflict", problem, where="data.block_size", remedy=remedy)
    if is_weighted and wanted.kind not in ("tokens", "any"):
        problem, remedy = f"a loss of {wanted.kind} rows does not weigh its rows", "Leave weight out."
        raise LuthierError("recipe-conflict", problem, where=f"{source.path}: weight", found=source.weight,
                           remedy=remedy)  # fmt: skip


def validation_supplies(data: Data, given: Any, *, telling: bool) -> list[Supply]:
    sources = data.validation if isinstance(data.validation, list) else []
    if given is None and not sources:
        return []
    return make_supplies(sources, given, "eval_data", data.text_unit, telling=telling)


def held_share(data: Data) -> float:
    """Return the share of the rows that is held back for validation; 0 if validation has its own sources."""
    share = data.validation
    if isinstance(share, list) or 0 <= share <= 0.5:
        return 0.0 if isinstance(share, list) else share
    raise LuthierError("recipe-out-of-range", "a share is from 0 to 0.5", where="data.validation", found=share)


def divide_rows(count: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of the rows for training and for validation, at least one each, both in order."""
    if count < 2:
        problem = f"{'one row' if count else 'no row'} cannot be divided into training and validation"
        raise LuthierError("data-empty", problem, where="data.validation", remedy="Give validation its own file.")
    most = min(max(1, round(share * count)), count - 1)
    validation = np.random.default_rng(seed).permutation(count)[:most]
    return np.setdiff1d(np.arange(count), validation), np.sort(validation)
