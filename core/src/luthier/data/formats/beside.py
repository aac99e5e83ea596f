"""The columns beside a row's own text: a system prompt, tools, and settings for the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from luthier.data.read.jsonfiles import embedded_json
from luthier.data.read.row import broken_row
from luthier.errors import LuthierError

NAMES: Final = ("system", "tools", "functions", "chat_template_kwargs")
TAKEN: Final = ("messages", "conversation", "conversations", "tools", "documents", "chat_template",
                "add_generation_prompt", "continue_final_message", "tokenize")  # fmt: skip
Messages = list[dict[str, Any]]


def is_filled(value: object) -> bool:
    """Return False for a value that counts as absent: null, an empty text, an empty list or object."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return False
    return bool(len(value)) if isinstance(value, (list, tuple, dict)) else True


def has_value(value: object) -> bool:
    """Return False for a value that is absent, or that holds absent ones alone, as tables write a missing picture."""
    if isinstance(value, (list, tuple)):
        return any(map(has_value, value))
    return any(map(has_value, value.values())) if isinstance(value, dict) else is_filled(value)


@attrs.frozen(kw_only=True)
class Beside:
    """The columns beside a conversation, in whatever form they are written."""

    system: str = ""
    tools: Messages | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Beside:
        tools = [values[name] for name in ("tools", "functions") if is_filled(values.get(name))]
        return cls(system=read_system(values.get("system")), tools=next(filter(None, map(read_tools, tools)), None))

    def __bool__(self) -> bool:
        return bool(self.system or self.tools)

    def before(self, messages: Messages) -> Messages:
        """Return the messages with the system prompt in front. Raises `data-row` if they begin with a system prompt."""
        if not self.system:
            return messages
        first = messages[0] if messages else {}
        if first.get("role") not in ("system", "developer"):
            return [{"role": "system", "content": self.system}, *messages]
        if first["content"].strip() == self.system.strip():
            return messages
        raise broken_row(
            "the row has two system prompts: its column system, and its first message", self.system, "system"
        )


def read_system(raw: object) -> str:
    if not is_filled(raw):
        return ""
    if not isinstance(raw, str):
        raise broken_row("system must be text", raw, "system")
    return raw


def is_tools(raw: object) -> bool:
    """Return True if a column holds tool schemas, perhaps as JSON text: a list of objects that each name a function."""
    try:
        parsed = _parsed(raw)
    except LuthierError:  # told where the row is read
        return True
    return isinstance(parsed, list) and (not parsed or any(_is_schema(tool) for tool in parsed))


def read_tools(raw: object) -> Messages | None:
    """Return tool schemas, perhaps parsed from JSON text; None if the entries are no schemas.

    A bare function is wrapped.
    """
    parsed = _parsed(raw)
    if not isinstance(parsed, list) or not any(_is_schema(tool) for tool in parsed):
        return None
    wrong = next((i for i, tool in enumerate(parsed) if not _is_schema(tool)), None)
    if wrong is not None:
        raise broken_row("some of the tools are schemas, but this one is not", parsed[wrong], f"tools[{wrong}]")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in parsed]


def _parsed(raw: object) -> object:
    """Return a list of schemas, of which one may stand alone, and which may be JSON text; anything else unchanged."""
    if isinstance(raw, str) and raw.lstrip().startswith(("[", "{")):
        raw = embedded_json(raw, "tools", "tools is not JSON")
    if isinstance(raw, (list, tuple)):
        return [_parsed_schema(tool) for tool in raw]
    return [raw] if _is_schema(raw) else raw


def _parsed_schema(tool: object) -> object:
    """Return a schema that is written as JSON text; anything else unchanged."""
    parsed = embedded_json(tool, "tools") if isinstance(tool, str) and tool.lstrip().startswith("{") else tool
    return parsed if _is_schema(parsed) else tool


def _is_schema(tool: object) -> bool:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str) and bool(function["name"])


def template_variables(raw: object, place: str = "chat_template_kwargs") -> dict[str, Any]:
    """Return the variables that a row or recipe sets for the chat template, perhaps parsed from JSON text."""
    if isinstance(raw, str) and raw.strip():
        raw = embedded_json(raw, place, "must be an object of the template's variables")
    if not is_filled(raw):
        return {}
    if not isinstance(raw, dict):
        raise broken_row("must be an object of the template's variables", raw, place)
    taken = sorted(set(TAKEN) & set(raw))
    if taken:
        raise broken_row("these variables of the template belong to the conversation", taken, place)
    return {name: value for name, value in raw.items() if value is not None}


def read_history(raw: object) -> list[tuple[str, str]]:
    """Return Alpaca's earlier questions with their answers, perhaps parsed from JSON text."""
    if isinstance(raw, str) and raw.strip():
        raw = embedded_json(raw, "history", "history must be a list of [question, answer]")
    if not is_filled(raw):
        return []
    if not isinstance(raw, (list, tuple)):
        raise broken_row("history must be a list of [question, answer]", raw, "history")
    return [_turn(turn, f"history[{i}]") for i, turn in enumerate(raw)]


def _turn(turn: object, place: str) -> tuple[str, str]:
    texts: Sequence[Any] = turn if isinstance(turn, (list, tuple)) else ()
    if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
        raise broken_row("must be a question and its answer, both texts", turn, place)
    return texts[0], texts[1]
