"""YAML 1.2 read through PyYAML's safe composer: its booleans and numbers, no duplicate keys, and every value's line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import yaml

from luthier.errors import LuthierError

MOST_NODES: Final = 100_000  # aliases of aliases could grow without bound
TAG: Final = "tag:yaml.org,2002:"
PLAIN: Final = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     "-+.0123456789"),
)  # fmt: skip


class Composer(yaml.SafeLoader):
    """A loader that only composes nodes; this module makes plain data of them, so no constructor is ever called."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class Dumper(yaml.SafeDumper):
    """A dumper that quotes texts which YAML 1.1 or 1.2 would read as something other than text."""

    yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_items(self, items: list[Any]) -> yaml.Node:
        """Represent a list of scalars on one line."""
        flow = not any(isinstance(item, (dict, list)) for item in items)
        return self.represent_sequence(TAG + "seq", items, flow_style=flow)


Dumper.add_representer(list, Dumper.represent_items)
for _name, _pattern, _first in PLAIN:
    for _kind in (Composer, Dumper):
        _kind.add_implicit_resolver(
            TAG + _name, re.compile(f"(?:{_pattern})\\Z"), [c if c != "\0" else "" for c in _first]
        )


def load_yaml(text: str, name: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """Return the document as plain data, and the line of each path in it. Raises `recipe-syntax` at `name:line`."""
    reader = _Reader(name)
    try:
        node = Composer(text).get_single_node()
        return (None if node is None else reader.read(node, ())), reader.lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # the end of the text is not a line of its own
        line = min(mark.line if mark else 0, text.count("\n", 0, len(text) - 1)) + 1
        raise _syntax(name, _problem(error), line) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _syntax(name, f"the character {error.character!r} is not allowed", line) from None
    except RecursionError:
        raise _syntax(name, "nested too deeply", 1) from None


def dump_yaml(value: Any) -> str:
    """Return plain data as YAML that `load_yaml` reads back equal, in the order of its keys."""
    text: str = yaml.dump(value, Dumper=Dumper, sort_keys=False, default_flow_style=False, width=120)
    return text


def _problem(error: yaml.MarkedYAMLError) -> str:
    if not error.context:
        return str(error.problem)
    place = f" (line {error.context_mark.line + 1})" if error.context_mark else ""
    return f"{error.context}{place}, {error.problem}"


def _syntax(name: str, problem: str, line: int) -> LuthierError:
    return LuthierError("recipe-syntax", problem, where=f"{name}:{line}" if name else None)


class _Reader:
    """A reader that turns nodes into plain data and records the line where each value begins."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[tuple[str, ...], int] = {}
        self.above: set[int] = set()  # nodes being read, because an alias to one of them would never end
        self.count = 0

    def read(self, node: yaml.Node, steps: tuple[str, ...]) -> Any:
        self.lines.setdefault(steps, node.start_mark.line + 1)
        self.count += 1
        if id(node) in self.above or self.count > MOST_NODES:
            raise self._wrong(node, "an alias that repeats itself")
        self.above.add(id(node))
        try:
            return self._value(node, steps)
        finally:
            self.above.discard(id(node))

    def _value(self, node: yaml.Node, steps: tuple[str, ...]) -> Any:
        kind = node.tag.removeprefix(TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, steps)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.read(child, (*steps, str(i))) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind in SCALARS:
            return self._scalar(node, kind)
        raise self._wrong(node, f"the tag {node.tag!r} is not plain data")

    def _mapping(self, node: yaml.MappingNode, steps: tuple[str, ...]) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._wrong(key_node, "a key is a list or mapping")
            key = self.read(key_node, (*steps, key_node.value))
            if key in mapping:
                line = self.lines[(*steps, str(key))]
                raise self._wrong(key_node, f"the key {key!r} is given twice, first in line {line}")
            self.lines[(*steps, str(key))] = key_node.start_mark.line + 1
            mapping[key] = self.read(child, (*steps, str(key)))
        return mapping

    def _scalar(self, node: yaml.ScalarNode, kind: str) -> Any:
        text = node.value
        try:
            return SCALARS[kind](text)
        except ValueError:
            raise self._wrong(node, f"{text[:40]!r} is no {kind}") from None

    def _wrong(self, node: yaml.Node, problem: str) -> LuthierError:
        return _syntax(self.name, problem, node.start_mark.line + 1)


def _null(text: str) -> None:
    return None


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _int(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").replace(".nan", "nan"))


SCALARS: Final[dict[str, Callable[[str], Any]]] = {
    "null": _null,
    "bool": _bool,
    "int": _int,
    "float": _float,
    "str": str,
}
