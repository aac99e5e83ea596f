"""The recognition of a source's format from its first rows, and the conversion of rows of each format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import Any, Final

import attrs

from luthier.data.formats.beside import is_filled, template_variables
from luthier.data.formats.conversations import from_chatml, from_messages, from_sharegpt, plain_conversation
from luthier.data.formats.documents import MASKS, from_alpaca, from_prompt_completion, from_text, from_tokens
from luthier.data.formats.forms import Form, Texts
from luthier.data.formats.known_columns import ROW_FLAGS, check_columns, own_values, row_weight
from luthier.data.formats.pairs import from_preference, from_unpaired
from luthier.data.formats.wanted import TOKENS, Wanted
from luthier.data.read.columns import advise_columns
from luthier.data.read.packed_rows import PackedRows
from luthier.data.read.row import Row
from luthier.errors import LuthierError

SAMPLE: Final = 100  # the number of rows that decide
SHARE: Final = 0.95  # the share of them that must fit
JUDGED: Final = ("preference", "unpaired")  # formats that one kind of loss takes
QUESTIONS: Final = ("question", "query", "instruction", "input", "prompt", "sentence", "context", "title")
ANSWERS: Final = ("answer", "response", "output", "completion", "label", "target", "solution", "reply")


@attrs.frozen(kw_only=True)
class Format:
    """A format: the columns that it needs, of which one of each group is enough, and the reader of its rows."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    convert: Callable[[dict[str, Any]], Form]
    others: tuple[str, ...] = ()  # columns that it reads if they exist
    kind: str = "tokens"  # the kind of losses that take it
    chatml: bool | None = None  # True if its text must begin as ChatML, False if it must not; None: either

    @property
    def reads(self) -> frozenset[str]:
        """Return every column that the format reads."""
        looked_at = ROW_FLAGS if self.needs else ()
        return frozenset({name for group in self.needs for name in group} | {*self.others, *looked_at})

    def fits(self, values: dict[str, Any]) -> bool:
        """Return True if the row has this format's columns. Their values are checked only by the conversion."""
        present = all(any(values.get(name) is not None for name in group) for group in self.needs)
        return present and (self.chatml is None or self.chatml == _is_chatml(values["text"]))


def _is_chatml(text: object) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("<|im_start|>")


TALK: Final = ("system", "tools", "functions", "chat_template_kwargs")
FORMATS: Final = {
    form.name: form
    for form in (
        Format(name="messages", needs=(("messages",),), convert=from_messages, others=(*TALK, "label")),
        Format(name="sharegpt", needs=(("conversations",),), convert=from_sharegpt, others=(*TALK, "label")),
        Format(
            name="alpaca",
            needs=(("instruction",), ("output", "response")),
            convert=from_alpaca,
            others=(*TALK, "input", "history"),
        ),
        Format(
            name="prompt_completion",
            needs=(("prompt",), ("completion",)),
            convert=from_prompt_completion,
            others=(*TALK, "label"),
        ),
        Format(name="chatml", needs=(("text",),), convert=from_chatml, chatml=True, others=TALK),
        Format(name="text", needs=(("text",),), convert=from_text, chatml=False),
        Format(
            name="tokens",
            needs=(("input_ids",),),
            convert=from_tokens,
            others=("labels", "attention_mask", "len", *MASKS),
        ),
        Format(
            name="preference",
            needs=(("chosen",), ("rejected",)),
            convert=from_preference,
            others=("prompt", *TALK),
            kind="preference",
        ),
        Format(
            name="unpaired",
            needs=(("completion", "messages"), ("label",)),
            convert=from_unpaired,
            others=("prompt", *TALK),
            kind="unpaired",
        ),
        Format(name="documents", needs=(), convert=lambda values: Texts(), kind="documents"),
    )
}


NEEDED: Final = frozenset(name for form in FORMATS.values() for group in form.needs for name in group)


def convert_row(row: Row, form: str, wanted: Wanted = TOKENS) -> Form:
    """Return the row in its format's form, with what the loss reads.

    Raises `data-row` with the reason if it does not fit.
    """
    if form == "messages" and row.fault is None and not (row.used or row.mapped or wanted.reads_columns):
        plain = plain_conversation(row.values, row.where)
        if plain is not None:
            return plain
    values = own_values(row.whole)
    try:
        if form != "documents":
            check_columns(values, form, wanted, row)
        made = FORMATS[form].convert(values)
        settings = template_variables(values.get("chat_template_kwargs")) if "chat_template_kwargs" in values else {}
    except LuthierError as error:
        raise error.at(row.where) from None
    return attrs.evolve(
        made,
        where=row.where,
        columns=wanted.read_columns(row),
        texts=wanted.read_texts(row),
        settings=settings,
        weight=row_weight(row, wanted),
    )


def first_rows(rows: Iterator[Row]) -> PackedRows[Row]:
    """Take the rows from which a format is recognised: the first ones, up to the hundredth that holds something."""
    first, filled = PackedRows[Row](), 0
    for row in rows:
        first.append(row)
        filled += not is_empty(row)
        if filled == SAMPLE:
            break
    return first


def recognise_format(rows: Sequence[Row], name: str, mapped: Collection[str] = (), kind: str = "any") -> str:
    """Return the one format that at least 95 % of the first 100 rows fit. Raises `data-format` with all counts
    otherwise.

    If columns were mapped, a format that uses none of them is no candidate while another one does. `kind` is the kind
    of rows that the loss takes: formats for some losses only are recognised only for these.
    """
    if kind == "documents":
        return "documents"
    sample = list(islice((row for row in rows if not is_empty(row)), SAMPLE)) or rows[:SAMPLE]
    forms = [form for form in FORMATS.values() if form.kind in ("tokens", "preference", kind) and form.needs]
    counts = {form.name: sum(form.fits(row.values) for row in sample) for form in forms}
    fitting = [form for form, count in counts.items() if count >= SHARE * len(sample)]
    if kind in JUDGED and any(_resembles(FORMATS[kind], row) for row in sample):
        return kind  # the conversion names the first row that does not fit, with what it lacks
    using = [form for form in fitting if any(set(group) & set(mapped) for group in FORMATS[form].needs)]
    fitting = using or fitting
    if len(fitting) == 1:
        return fitting[0]
    raise _several(fitting, counts, sample, name) if fitting else _none(counts, sample, name)


def is_empty(row: Row) -> bool:
    """Return True if a row holds nothing: it has some of the format's columns, and none of them has a value."""
    known = [value for name, value in row.values.items() if name in NEEDED]
    return row.fault is not None or not row.values or (bool(known) and not any(map(is_filled, known)))


def _resembles(form: Format, row: Row) -> bool:
    return any(row.values.get(name) is not None for group in form.needs for name in group)


def _several(fitting: list[str], counts: dict[str, int], sample: Sequence[Row], name: str) -> LuthierError:
    listed = ", ".join(f"{form} ({counts[form]} of {len(sample)})" for form in fitting)
    remedy = f"Set data.format to one of: {', '.join(fitting)}."
    return LuthierError("data-format", f"the rows fit several formats: {listed}", where=name, remedy=remedy)


def _none(counts: dict[str, int], sample: Sequence[Row], name: str) -> LuthierError:
    columns = sorted({column for row in sample for column in row.values})
    near = {form: count for form, count in counts.items() if count}
    if not near:
        forms = [FORMATS[name] for name in counts]
        known = ", ".join(f"{f.name} ({', '.join('|'.join(group) for group in f.needs)})" for f in forms)
        problem = f"the rows fit no known format; columns present: {', '.join(columns)}"
        remedy = f"{_mapping(columns, name)} Formats and their columns: {known}."
        return LuthierError("data-format", problem, where=name, remedy=remedy)
    best = FORMATS[max(near, key=lambda form: near[form])]
    first = next(row.where for row in sample if not best.fits(row.values))
    listed = ", ".join(f"{form} ({count} of {len(sample)})" for form, count in near.items())
    problem = f"no format fits 95 % of the rows: {listed}; the first that does not fit {best.name} is {first}"
    return LuthierError("data-format", problem, where=name)


def _mapping(columns: Sequence[str], path: str) -> str:
    """Return advice that names the data's own columns if they look like question and answer."""
    ask = next((name for name in QUESTIONS if name in columns), None)
    tell = next((name for name in ANSWERS if name in columns), None)
    if ask and tell:
        return f"Set {advise_columns(f'prompt: {ask}, completion: {tell}', path)}."
    return f"Name the columns, such as {advise_columns('prompt: question, completion: answer', path)}."
