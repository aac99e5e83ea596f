"""Chat templates rendered for contents that are not known, by jinja2 in the same sandbox as for rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jinja2.nodes
import jinja2.sandbox
from jinja2.nativetypes import NativeCodeGenerator

from luthier.data.tokenise.plain.plain_jinja import new_sandbox
from luthier.data.tokenise.shapes.symbolic_text import (
    Piece,
    Slot,
    SymbolicText,
    Trace,
    UnknownText,
    join_texts,
    pieces_of,
)
from luthier.timestamp import format_now

ANSWERS: Final = {  # what the tests of jinja2 say of every text
    **dict.fromkeys(("string", "iterable", "sequence", "defined"), True),
    **dict.fromkeys(("mapping", "number", "integer", "float", "boolean", "true", "false", "none"), False),
    **dict.fromkeys(("undefined", "callable"), False),
}
COMPARISONS: Final = ("==", "eq", "equalto", "!=", "ne", "in")
RANDOM: Final = ("random", "lipsum")  # a filter and a function whose results differ from call to call
ESCAPING: Final = "autoescape"  # a tag that changes texts where they are written


def trace_template(
    template: str, roles: Sequence[str], trace: Trace, variables: Mapping[str, Any]
) -> tuple[Piece, ...]:
    """Return what a template writes for messages of these roles: known texts, and slots for contents.

    `trace` gets what the template asks about the contents. Raises UnknownText if it does more with them than can be
    followed, and what jinja2 and the template raise.
    """
    if ESCAPING in template:
        raise UnknownText
    messages = [{"role": role, "content": SymbolicText(trace, [Slot(index)])} for index, role in enumerate(roles)]

    def write_now(form: str) -> str:
        return trace.dates.setdefault(form, format_now(form))

    given = {"strftime_now": write_now, **variables, "messages": messages}
    return pieces_of(_compile(template).render(given))


class TracingGenerator(NativeCodeGenerator):
    """A generator of code that hands on what a template writes as it is, without making a str of it."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class TracingSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of chat templates for texts with unknown parts."""

    code_generator_class = TracingGenerator
    concat = staticmethod(join_texts)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    sandbox = new_sandbox(TracingSandbox)
    sandbox.filters = {name: _guard_filter(name, filter_) for name, filter_ in sandbox.filters.items()}
    sandbox.tests = {name: _guard_test(name, test) for name, test in sandbox.tests.items()}
    sandbox.globals |= dict.fromkeys(RANDOM, _refuse)
    return sandbox.from_string(template)


def _guard_filter(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that knows what it makes of an unknown text, or raises."""

    @functools.wraps(filter_)
    def guarded(*arguments: Any, **options: Any) -> Any:
        unknown = [value for value in (*arguments, *options.values()) if isinstance(value, SymbolicText)]
        if name in RANDOM:
            raise UnknownText
        if not unknown:
            return filter_(*arguments, **options)
        text, *others = arguments
        if len(unknown) > 1 or text is not unknown[0] or options:
            raise UnknownText
        if name == "trim" and len(others) < 2:
            return text.strip(*others)
        if name == "string" or (name in ("default", "d") and len(others) < 2):
            return text
        raise UnknownText

    return guarded


def _guard_test(name: str, test: Any) -> Callable[..., Any]:
    """Return a test that knows what it says of an unknown text, or raises."""

    @functools.wraps(test)
    def guarded(*arguments: Any) -> Any:
        if not any(isinstance(value, SymbolicText) for value in arguments):
            return test(*arguments)
        if name in ANSWERS and len(arguments) == 1:
            return ANSWERS[name]
        if name in COMPARISONS:
            return test(*arguments)
        raise UnknownText

    return guarded


def _refuse(*_: Any, **__: Any) -> Any:
    raise UnknownText
