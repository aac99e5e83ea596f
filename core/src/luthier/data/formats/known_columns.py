"""Columns whose names say that they change a row's meaning.

They are read, or refused until the recipe explains them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Final

import attrs

from luthier.data.formats.beside import has_value, is_filled, is_tools
from luthier.data.formats.conversations import KEPT, MEDIA
from luthier.data.formats.documents import MASKS
from luthier.data.formats.message_flags import FLAGS, NUMBERS, OPPOSITES
from luthier.data.formats.wanted import Wanted, advise_losses
from luthier.data.read.columns import advise_columns
from luthier.data.read.row import Row
from luthier.errors import LuthierError

OPTIONAL: Final = ("system", "tools", "functions", "history", "chat_template_kwargs", "label", "input", "weight")
# formats whose label says that the answer is one to avoid
SPOKEN: Final = ("messages", "sharegpt", "prompt_completion")
VERDICTS: Final = ("label", "kto_tag")
ROW_FLAGS: Final = (*NUMBERS, "train", "trainable", "unmask", "loss_mask")
MESSAGE_KEYS: Final = frozenset(
    ("role", "content", "from", "value", "tool_calls", "function_call", *KEPT, *MEDIA, *FLAGS)
)


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float, list, tuple))


def _is_verdict(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))


# the values for which such a column is read; with others it is like any column that nothing reads
READ_WHERE: Final[Mapping[str, Callable[[object], bool]]] = {
    "tools": is_tools, "functions": is_tools, "label": _is_verdict, **dict.fromkeys(ROW_FLAGS, _is_number)
}  # fmt: skip


def own_values(row: Row) -> dict[str, Any]:
    """Return the row's values, without optional columns that a template has used and the recipe does not name."""
    used = row.used - row.mapped
    return {name: value for name, value in row.values.items() if name not in used or name not in OPTIONAL}


def check_columns(values: Mapping[str, Any], form: str, wanted: Wanted, row: Row) -> None:
    """Raise `data-column` for a column that would change the row's meaning and that nothing reads.

    A column that `columns`, a template or the loss uses, or that is empty, is allowed.
    """
    read_columns = {*row.mapped, *row.used, *wanted.columns, *wanted.documents.values()}
    for name in MEDIA:
        if name not in read_columns and has_value(values.get(name)):
            raise _unread(name, values[name], "holds something other than text, but only text is trained")
    for name in ROW_FLAGS:
        if name not in read_columns and name in values and not (form == "tokens" and name in MASKS):
            _check_flag(name, values[name])
    _check_verdict(values, form, wanted, read_columns - {"label"} if "label" in row.mapped else read_columns)


def _check_flag(name: str, value: object) -> None:
    """Raise `data-column` for a flag of the whole row, unless it says what is so anyway."""
    usual = 0 if name in (*OPPOSITES, "unmask") else 1
    if isinstance(value, (list, tuple)) and value:
        raise _unread(name, value, "says which part of the row is supervised, which messages must say themselves")
    if isinstance(value, (bool, int, float)) and value != usual:
        raise _unread(name, value, "says how much the row counts", weigh=name in NUMBERS)


def _check_verdict(values: Mapping[str, Any], form: str, wanted: Wanted, columns: Collection[str]) -> None:
    """Raise `data-avoided` if the row marks its answer as one to avoid, because the loss would train it."""
    if wanted.kind not in ("tokens", "any") or form not in SPOKEN or "label" in wanted.columns:
        return
    for name in VERDICTS:
        value = values.get(name)
        if name not in columns and (value is False or (isinstance(value, str) and value.lower() == "false")):
            problem = "the row marks its answer as one to avoid, but the loss would train it"
            ignored = advise_columns(f"{name}: ignore")
            remedy = f"For such rows, {advise_losses('unpaired')}. Or set {ignored}."
            raise LuthierError("data-avoided", problem, where=name, found=value, remedy=remedy)


def _unread(name: str, value: object, said: str, *, weigh: bool = False) -> LuthierError:
    weighed = f"To multiply the row's loss by it, set columns: {{weight: {name}}}. " if weigh else ""
    remedy = f"{weighed}To train without it, set {advise_columns(f'{name}: ignore')}."
    return LuthierError("data-column", f"column {name!r} {said}", where=name, found=value, remedy=remedy)


def row_weight(row: Row, wanted: Wanted) -> float:
    """Return the weight of a row whose weight column the recipe names; 1 for other rows."""
    if "weight" not in row.mapped or "weight" in wanted.columns or row.values.get("weight") is None:
        return 1.0
    if wanted.kind not in ("tokens", "any"):
        problem = f"a loss of {wanted.kind} rows does not weigh its rows"
        raise LuthierError("recipe-conflict", problem, where="data.train.columns", remedy="Leave weight out.")
    return Wanted(columns={"weight": "float"}).read_columns(row)["weight"]


@attrs.define
class UnreadColumns:
    """The columns, and the keys of messages, that have a value in some row and that nothing reads.

    `reads` are the columns that the rows' format reads.
    """

    reads: Collection[str]
    wanted: Wanted
    found: set[str] = attrs.field(factory=set)
    known: frozenset[str] = attrs.field(init=False)  # the columns that the format or the loss reads

    def __attrs_post_init__(self) -> None:
        self.known = frozenset((*self.reads, *self.wanted.columns, *self.wanted.documents.values()))

    def note(self, row: Row) -> None:
        """Add what nothing reads of a row."""
        if not row.values.keys() <= self.known:
            read_columns = row.used | row.mapped
            further = row.values.keys() - self.known - read_columns - self.found
            self.found.update(name for name in further if is_filled(row.values[name]))
        if not READ_WHERE.keys().isdisjoint(row.values):
            self.found.update(self._misfits(row))
        self.found.update(_message_keys(row))

    def _misfits(self, row: Row) -> Iterator[str]:
        """Yield the columns with values other than those for which they are read."""
        judged = {"label"} if self.wanted.kind == "unpaired" else set()  # whose every value is read, or an error
        for name in (row.values.keys() & READ_WHERE.keys() & self.known) - judged:
            value, is_read = row.values[name], READ_WHERE[name]
            own = name in self.reads and name not in row.used | row.mapped
            if own and is_filled(value) and not is_read(value):
                yield name


def _message_keys(row: Row) -> Iterable[str]:
    for column in ("messages", "conversations"):
        value = row.values.get(column)
        for message in value if isinstance(value, list) else ():
            if isinstance(message, dict) and not message.keys() <= MESSAGE_KEYS:
                extra = message.keys() - MESSAGE_KEYS
                yield from (f"{column}[].{key}" for key in extra if is_filled(message[key]))
