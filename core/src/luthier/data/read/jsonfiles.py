"""JSON and JSON Lines read as rows with their lines. NaN, lone surrogates and deep nesting are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from luthier.data.read.row import Row, broken_row, faulty_row, row_of, unreadable_row
from luthier.data.read.textfiles import read_lines, read_whole

ROW_COLUMNS = {"messages", "conversations", "text", "prompt", "instruction", "input_ids", "chosen"}
SPACE = re.compile(r"\s*")
ESCAPE = "\\u"  # searched for first, as that takes a tenth of the time
SURROGATE = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class RepeatedKey(ValueError):
    """An object names one of its keys twice with different values, of which only one could be kept."""


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        for name, given in pairs:
            if json.dumps(given) != json.dumps(value[name]):  # 1 and true are equal in Python
                raise RepeatedKey(f"the key {name!r} is given twice, with different values")
    return value


DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_object)
QUICK_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)  # of a repeated key the last value stays


def parse_json(text: str, start: int = 0, decoder: json.JSONDecoder = DECODER) -> tuple[Any, int]:
    """Return the value that begins at `start`, and where it ends.

    Raises ValueError with the reason if there is none, or if an object gives a key two different values.
    """
    try:
        value, end = decoder.raw_decode(text, start)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if ESCAPE in text and SURROGATE.search(text, start, end):
        _check_surrogates(value)
    return value, end


def _check_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no valid text") from None


def has_keys(text: str, number: int) -> bool:
    """Return True if the JSON text of a value surely names this many keys at most. It is not parsed.

    Each key has a colon, and so may a message. A key's follows a quote, unless there is space between them.
    """
    if text.count(":") <= number:  # true of most rows, and by far the quickest
        return True
    return text.count('":') <= number and not (" :" in text or "\t" in text or "\n" in text or "\r" in text)


def embedded_json(text: str, place: str, problem: str = "") -> Any:
    """Return the value of JSON text that stands inside of a row.

    Raises `data-row`, with `problem` if it is no JSON; without a problem the text itself is then returned.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_object)
    except RepeatedKey as error:
        raise broken_row(str(error), text, place) from None
    except (ValueError, RecursionError):
        if not problem:
            return text
        raise broken_row(problem, text, place) from None


def _explain(error: ValueError) -> str:
    if isinstance(error, RepeatedKey):
        return str(error)
    return f"not JSON: {error.msg if isinstance(error, json.JSONDecodeError) else error}"


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yield one row per line. Blank lines are skipped."""
    first = ""
    for number, line in read_lines(path):
        if text := line.strip():
            if not first and text[0] in "[{":
                check_first_line(text, f"{path}:{number}")
            first = first or text
            yield parse_row(text, f"{path}:{number}")


def check_first_line(first: str, where: str) -> None:
    """Raise `data-unreadable` if the first line shows that a file named as JSON Lines is a JSON file."""
    try:
        value = parse_json(first)[0]
    except ValueError:
        value = None
    begun = first.rstrip() in ("[", "{") or (first[0] == "[" and value is None)
    rows = isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    if not begun and not (rows and not _is_message(value[0])):
        return
    what = "an array" if first[0] == "[" else "an object over several lines"
    name = where.rpartition(":")[0]
    suffix = next(s for s in (".jsonl", ".ndjson", "") if s in name)
    problem = f"the file is {what} in JSON, but its name says one object a line"
    renamed = name.replace(suffix, ".json") if suffix else f"{name}.json"
    raise unreadable_row(where, problem, first[:40], f"Rename it to {renamed}.")


def _is_message(value: dict[str, Any]) -> bool:
    """Return True if an object is a message. A line with only messages is a row without its column's name."""
    return "role" in value or "from" in value


def parse_row(text: str, where: str) -> Row:
    try:
        value, end = parse_json(text)
    except ValueError as error:
        return faulty_row(broken_row(_explain(error), text, where))
    if text[end:].strip():
        return faulty_row(broken_row("not JSON: more text after the object", text[end:].strip(), where))
    return row_of(value, where)


def read_json(path: Path) -> Iterator[Row]:
    """Yield the rows of an array, of an object that holds one, of an object of named rows, or of successive objects."""
    text = read_whole(path)
    start = SPACE.match(text).end()  # type: ignore[union-attr]
    if text.startswith("[", start):
        yield from _array(text, start + 1, path)
    elif text.startswith("{", start):
        yield from _objects(text, start, path)
    elif text.strip():
        raise unreadable_row(
            f"{path}:1", "a JSON file must hold an array or an object of rows", text[start : start + 40]
        )


class _Places:
    """A counter that gives line numbers for rising positions in a text."""

    def __init__(self, text: str, path: Path) -> None:
        self.text, self.path, self.line, self.seen = text, path, 1, 0

    def at(self, position: int) -> str:
        self.line += self.text.count("\n", self.seen, position)
        self.seen = max(self.seen, position)
        return f"{self.path}:{self.line}"

    def parse(self, start: int) -> tuple[Any, int]:
        try:
            return parse_json(self.text, start)
        except ValueError as error:
            position = error.pos if isinstance(error, json.JSONDecodeError) else start
            raise unreadable_row(self.at(position), _explain(error)) from None

    def skip(self, start: int) -> int:
        return SPACE.match(self.text, start).end()  # type: ignore[union-attr]


def _array(text: str, start: int, path: Path) -> Iterator[Row]:
    places = _Places(text, path)
    start = places.skip(start)
    while not text.startswith("]", start):
        where = places.at(start)
        value, end = places.parse(start)
        yield row_of(value, where)
        start = places.skip(end)
        if text.startswith(",", start):
            start = places.skip(start + 1)
            if text.startswith("]", start):
                raise unreadable_row(places.at(start), "not JSON: a comma after the last row")
        elif not text.startswith("]", start):
            raise unreadable_row(places.at(start), "not JSON: the array is cut short, or a comma is missing")
    if text[start + 1 :].strip():
        raise unreadable_row(places.at(start), "not JSON: more text after the array")


def _objects(text: str, start: int, path: Path) -> Iterator[Row]:
    places = _Places(text, path)
    value, end = places.parse(start)
    if not text[end:].strip():
        yield from _rows_of(value, path)
        return
    while start < len(text):
        where = places.at(start)
        value, end = places.parse(start)
        yield row_of(value, where)
        start = places.skip(end)


def _rows_of(value: dict[str, Any], path: Path) -> Iterator[Row]:
    """Yield the rows of a file that is one object: the object, each of its values, or its one list of objects."""
    if ROW_COLUMNS & value.keys():
        yield Row(value, f"{path}:1")
        return
    if value and all(isinstance(v, dict) for v in value.values()):
        yield from (Row(row, f"{path}:{name}") for name, row in value.items())
        return
    lists = [name for name, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    if len(lists) != 1:
        raise unreadable_row(f"{path}:1", "the object is neither a row nor holds exactly one list of rows", list(value))
    yield from (row_of(row, f"{path}:{lists[0]}[{i}]") for i, row in enumerate(value[lists[0]]))
