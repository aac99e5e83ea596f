"""Recipe files: YAML, TOML and JSON read as plain data, with the line of every value."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from luthier.errors import LuthierError, suggest_nearest
from luthier.recipe.reading import yaml12

Lines = dict[tuple[str, ...], int]
TOML_KEY: Final = re.compile(r"""\s*([\w.\-"' ]+?)\s*=""")
TOML_TABLE: Final = re.compile(r"""\s*(\[\[?)\s*([\w.\-"' ]+?)\s*\]\]?\s*(#.*)?""")
TOML_PLACE: Final = re.compile(r"\(at (?:line (\d+), column \d+|end of document)\)")


LARGEST: Final = 2**20  # bytes of a recipe
DEEPEST: Final = 32  # levels of mappings and lists
LONGEST: Final = 256  # characters of a key
TOO_DEEP: Final = f"nested more than {DEEPEST} deep, which no recipe is"
TOML_DEEP: Final = re.compile(rf"(?m)^[ \t\[]*(?:[\w\-\"']+[ \t]*\.[ \t]*){{{DEEPEST},}}")


def find_file(path: Path) -> Path:
    """Return the recipe file that a path means: itself, or the resolved recipe in a run's folder."""
    return path / "recipe.yaml" if (path / "recipe.yaml").is_file() else path


def read_recipe_file(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """Return a file's mapping, and `file:line` for each path in it.

    Raises `recipe-not-found`, or `recipe-syntax` if the file is not text, not YAML, TOML or JSON, or not a mapping.
    """
    if not path.exists():
        raise _not_found(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        names = " or ".join(f"*{suffix}" for suffix in READERS)
        remedy = f"Name it {names}; a file of rows belongs to --data."
        raise LuthierError("recipe-syntax", "not the name of a recipe", where=str(path), remedy=remedy)
    tree, lines = reader(_text(path), str(path))
    if not isinstance(tree, dict):
        raise LuthierError("recipe-syntax", "a recipe must be a mapping of options", where=str(path), found=tree)
    _check_extent(tree, str(path))
    _refuse_surrogates(tree, str(path))
    return tree, {steps: f"{path}:{line}" for steps, line in lines.items()} | {(): str(path)}


def _check_extent(tree: Any, name: str) -> None:
    """Raise `recipe-syntax` for a tree that is deeper, or a key that is longer, than any recipe's."""
    waiting = [(tree, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            raise LuthierError("recipe-syntax", TOO_DEEP, where=name)
        for key in value if isinstance(value, dict) else ():
            if isinstance(key, str) and len(key) > LONGEST:
                problem = f"a key of {len(key):,} characters; at most {LONGEST} are allowed"
                raise LuthierError("recipe-syntax", problem, where=name, found=key)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(child, depth + 1) for child in inner if isinstance(child, (dict, list))]


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            problem, remedy = f"larger than {LARGEST:,} bytes, which no recipe is", "Name the recipe, not its data."
            raise LuthierError("recipe-syntax", problem, where=str(path), remedy=remedy)
        return content.decode("utf-8-sig")
    except OSError as error:
        raise LuthierError("recipe-not-found", f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise LuthierError("recipe-syntax", "not UTF-8 text", where=f"{path}:{line}") from None


def _not_found(path: Path) -> LuthierError:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = suggest_nearest(path.name, names)
    return LuthierError("recipe-not-found", "no such file", where=str(path), remedy=near if near[:3] == "Did" else None)


def _read_yaml(text: str, name: str) -> tuple[Any, Lines]:
    return yaml12.load_yaml(text, name)


def _read_json(text: str, name: str) -> tuple[Any, Lines]:
    try:
        tree = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise LuthierError("recipe-syntax", f"not JSON: {error.msg}", where=f"{name}:{error.lineno}") from None
    except RecursionError:
        raise LuthierError("recipe-syntax", "nested too deeply", where=name) from None
    except ValueError as error:  # a key given twice, or a number with thousands of digits
        _json_lines(text, name, strict=True)
        raise LuthierError("recipe-syntax", f"not JSON: {error}", where=name) from None
    return tree, _json_lines(text, name, strict=False)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"the key {key!r} is given twice")
        mapping[key] = value
    return mapping


def _json_lines(text: str, name: str, *, strict: bool) -> Lines:
    """Return the lines found by the YAML reader, as JSON is nearly YAML; none if it cannot read the text (tabs)."""
    try:
        return yaml12.load_yaml(text, name)[1]
    except LuthierError:
        if strict and "\t" not in text:
            raise
        return {}


def _read_toml(text: str, name: str) -> tuple[Any, Lines]:
    deep = TOML_DEEP.search(text)
    if deep:
        raise LuthierError("recipe-syntax", TOO_DEEP, where=f"{name}:{text.count(chr(10), 0, deep.start()) + 1}")
    try:
        return tomllib.loads(text), _toml_lines(text)
    except tomllib.TOMLDecodeError as error:
        place = TOML_PLACE.search(str(error))
        line = int(place[1]) if place and place[1] else text.count("\n") + 1
        problem = TOML_PLACE.sub("", str(error)).strip()
        raise LuthierError("recipe-syntax", f"not TOML: {problem}", where=f"{name}:{line}") from None
    except (RecursionError, ValueError) as error:
        raise LuthierError("recipe-syntax", f"not TOML: {error}", where=name) from None


def _toml_lines(text: str) -> Lines:
    """Return the line of each key at the beginning of a line, under its table: good enough to name a place."""
    lines: Lines = {}
    table: tuple[str, ...] = ()
    counts: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        heading, key = TOML_TABLE.fullmatch(line), TOML_KEY.match(line)
        if heading:
            table = _toml_steps(heading[2])
            if heading[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, str(counts[table]))
            lines[table] = number
        elif key:
            lines.setdefault((*table, *_toml_steps(key[1])), number)
    return lines


def _toml_steps(key: str) -> tuple[str, ...]:
    return tuple(step.strip().strip("\"'") for step in key.split("."))


def _refuse_surrogates(value: Any, name: str) -> None:
    """Raise `recipe-syntax` for dates, and for lone surrogates: half a character, which no file can hold."""
    if isinstance(value, dict):
        for pair in value.items():
            _refuse_surrogates(list(pair), name)
    elif isinstance(value, list):
        for item in value:
            _refuse_surrogates(item, name)
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise LuthierError("recipe-syntax", "text with half a character", where=name, found=value) from None
    elif not isinstance(value, (str, int, float, type(None))):
        raise LuthierError("recipe-syntax", "a recipe holds no dates and times", where=name, found=value)


READERS: Final[dict[str, Callable[[str, str], tuple[Any, Lines]]]] = {
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".toml": _read_toml,
    ".json": _read_json,
}
