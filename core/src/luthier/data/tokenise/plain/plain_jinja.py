"""Chat templates rendered by jinja2 alone, in its sandbox, as transformers renders them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

from luthier.timestamp import format_now

THOUGHTS: Final = ("reasoning_content", "thinking", "reasoning")  # names of a message's thought, the standard one first

Spans = list[tuple[int, int]]


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, tagged: bool = False
) -> tuple[str, Spans]:
    """Return a conversation as text; with `tagged`, also the character spans between its generation tags.

    The template sees `variables` beside the messages; a thought is available under each of its names. Raises what
    jinja2 and the template raise.
    """
    chat = [_with_thoughts(dict(message)) for message in messages]
    compiled = _compile(template)
    if not tagged:
        return compiled.render(variables, messages=chat), []
    tracker = Tracked()
    for piece in compiled.generate(variables, messages=chat, luthier_tracker=tracker):
        tracker.pieces.append(piece)
    return "".join(tracker.pieces), tracker.spans


class Tracked:
    """The pieces written so far, and where generation tags begin and end in them."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.spans: Spans = []


LONGEST: Final = 1 << 26  # characters of a text that a loop keeps: it can double itself, and would fill the memory
TRACKER: Final = "luthier_tracker"  # the variable by which the tags of one rendering find its record


class GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        place = jinja2.nodes.ContextReference()
        call = self.call_method("_mark", [place])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: Any, caller: Any) -> str:
        said: str = caller()
        tracker = context.get(TRACKER)
        if tracker is not None:
            start = sum(map(len, tracker.pieces))
            tracker.spans.append((start, start + len(said)))
        return said


class DictMaker:
    """The function that templates call as `dict`. It is not the class itself, whose attributes would lead further."""

    def __call__(self, *pairs: Any, **values: Any) -> dict[Any, Any]:
        return dict(*pairs, **values)

    def fromkeys(self, names: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(names, value)


class GuardedNamespace(jinja2.utils.Namespace):
    """A namespace that gives no template a name that begins with an underscore, nor room to double a text for ever."""

    def __init__(*args: Any, **values: Any) -> None:  # without a parameter named `self`, which may be a value's name
        _refuse_hidden(dict(*args[1:], **values))
        jinja2.utils.Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden([name])
        if isinstance(value, str) and len(value) > LONGEST:
            raise jinja2.TemplateError(f"a text of {len(value):,} characters; {LONGEST:,} are the most")
        super().__setitem__(name, value)


def _refuse_hidden(names: Any) -> None:
    for name in names:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")


def _with_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    thought = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    if thought is None:
        return message
    return {THOUGHTS[1]: thought, **message, THOUGHTS[0]: thought}


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    return new_sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment).from_string(template)


def new_sandbox(
    kind: type[jinja2.sandbox.ImmutableSandboxedEnvironment],
) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Return a sandbox of a class with the tags, filters and functions that chat templates use."""
    sandbox = kind(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = _to_json
    sandbox.globals |= {"raise_exception": _refuse, "strftime_now": format_now}
    sandbox.globals |= {"namespace": GuardedNamespace, "dict": DictMaker()}
    return sandbox


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
