"""A look at the first rows, without torch: what is wrong with them is told before anything heavy is imported."""

from __future__ import annotations

import itertools
from typing import Final

from luthier.data.formats.read_rows import ReadRows
from luthier.data.formats.recognise_form import first_rows
from luthier.data.formats.wanted import Wanted
from luthier.data.prepare import form_of, prepare_data
from luthier.data.read.sources import file_kind, find_files, local_sources
from luthier.data.stream.source_rows import Supply, make_supplies
from luthier.data.tokenise.plain.file_tokenizer import read_tokenizer
from luthier.recipe import Recipe, resolve_parts
from luthier.recipe.schema import Data

LOOKED: Final = 1000  # rows of each source
SMALL: Final = 2**25  # bytes of files that are prepared for the sake of an error, or read whole for a look


def check_first_rows(recipe: Recipe) -> None:
    """Raise what the preparation of the rows would raise, if the first rows of local files show that it will.

    A format is refused at once. After a bad row all rows are prepared, as the error lists every bad one; a model whose
    tokenizer needs transformers, and larger files, are left to the run.
    """
    data, sources = recipe.data, local_sources(recipe.data)
    if not sources or recipe.trainer is not None:  # the rows of another trainer are its own affair
        return
    wanted = Wanted.of_part(resolve_parts(recipe).loss)
    supplies = [s for s in make_supplies(sources, None, "data", data.text_unit, telling=False) if _is_read_lazily(s)]
    is_bad = [_has_bad_row(data, supply, wanted) for supply in supplies]
    if not any(is_bad) or data.bad_rows != "error" or data.streaming or sum(map(_size, supplies)) > SMALL:
        return
    tokenizer = read_tokenizer(recipe.model, data.chat_template_kwargs or {})
    if tokenizer is not None:
        prepare_data(data, tokenizer, seed=recipe.seed, wanted=wanted)


def _has_bad_row(data: Data, supply: Supply, wanted: Wanted) -> bool:
    """Return True if one of a source's first rows cannot be converted. Raises if its format is refused."""
    rows, read = supply.read_once(), ReadRows()
    first = first_rows(rows)
    read.add(
        itertools.islice(itertools.chain(first, rows), LOOKED), form_of(data, first, supply.source, wanted), wanted
    )
    return bool(read.faults)


def _is_read_lazily(supply: Supply) -> bool:
    return _size(supply) <= SMALL or not any(file_kind(path) == ".json" for path in find_files(supply.source.path))


def _size(supply: Supply) -> int:
    return sum(path.stat().st_size for path in find_files(supply.source.path))
