"""Rows of some lines of a file, which are read by the process that makes examples of them."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from luthier.data.examples import TokenDataset
from luthier.data.formats.conversations import plain_conversation
from luthier.data.formats.forms import Conversation, Form
from luthier.data.formats.read_rows import ReadRows, RowReading
from luthier.data.formats.wanted import Wanted
from luthier.data.read.columns import column_mapper
from luthier.data.read.jsonfiles import QUICK_DECODER, has_keys, parse_json, parse_row
from luthier.data.read.line_blocks import LineBlock, LinesRefused
from luthier.data.read.row_limit import LIMIT, limit_row
from luthier.data.tokenise.examples_of_rows import Made, Maker
from luthier.errors import LuthierError
from luthier.recipe.schema import Source


@attrs.frozen(kw_only=True)
class LineRows:
    """The rows of a block of lines, and how they are read."""

    block: LineBlock
    form: str
    wanted: Wanted
    source: Source

    def __len__(self) -> int:
        return self.block.count

    @property
    def ends(self) -> tuple[str, str]:
        """Return the places of the first line and of the last one, if none between them is blank."""
        block = self.block
        return f"{block.path}:{block.first}", f"{block.path}:{block.first + block.count - 1}"

    def made_by(self, maker: Maker) -> Made:
        """Return the examples of the rows, with everything else that was read of them.

        After an error that is no row's own nothing is returned as read: which error comes first is known only to those
        who read all rows in order.
        """
        try:
            read = self.read()
            made = maker.make(read.forms)
        except (LinesRefused, LuthierError, OSError, UnicodeDecodeError):
            return Made(examples=TokenDataset.of(()), rows=0)
        made.read = attrs.evolve(read, forms=[])
        return made

    def read(self) -> ReadRows:
        """Return the rows in their format's form. The columns that nothing reads are not sorted yet."""
        read, source = ReadRows(forms=[]), self.source
        reading, mapper = RowReading(read, self.form, self.wanted, source), column_mapper(source)
        is_plain = self.form == "messages" and not (source.columns or source.template or self.wanted.reads_columns)
        for text, where in self.block.lines():
            plain = parse_plain_row(text, where) if is_plain else None
            if plain is None:
                reading.add(mapper(limit_row(parse_row(text, where))))
            else:
                read.take(plain)
        read.unread = [*reading.unread.found]
        return read


def parse_plain_row(text: str, where: str) -> Conversation | None:
    """Return the form of a line that is a row of plain messages; None for another line."""
    if len(text) > LIMIT:
        return None
    try:
        value, end = parse_json(text, decoder=QUICK_DECODER)
    except ValueError:
        return None
    plain = plain_conversation(value, where) if type(value) is dict and end == len(text) else None
    # a row with more keys in its text than in its value names one of them twice; so may one with "\":" in a message
    return plain if plain is None or has_keys(text, 1 + 2 * len(plain.messages)) else None


Part = Sequence[Form] | LineRows  # rows that are made together


def make_part(maker: Maker, part: Part) -> Made:
    """Return the examples of some rows, which are read first if they are lines."""
    return part.made_by(maker) if isinstance(part, LineRows) else maker.make(part)
