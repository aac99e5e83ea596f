"""Rows that are conversations: OpenAI messages with tools, ShareGPT, and ChatML text."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from luthier.data.formats.forms import Conversation
from luthier.data.read.row import broken_row
from luthier.errors import LuthierError, suggest_nearest

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
SPEAKERS: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "function_call",
    "tool_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
KEPT: Final = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
CHATML: Final = re.compile(r"\s*<\|im_start\|>([^\n]*)\n(.*?)<\|im_end\|>", re.DOTALL)


def make_conversation(
    messages: list[dict[str, Any]], tools: object = None, context: int = 0, weights: list[object] | None = None
) -> Conversation:
    """A conversation of read messages; the first `context` of them and those of weight 0 are not supervised."""
    weights = weights or [None] * len(messages)
    pairs = enumerate(zip(messages, weights, strict=True))
    trained = tuple(m["role"] == "assistant" and i >= context and weight != 0 for i, (m, weight) in pairs)
    return Conversation(messages=tuple(messages), trained=trained, tools=read_tools(tools))


def from_messages(values: dict[str, Any]) -> Conversation:
    raw = values.get("messages")
    messages = read_messages(raw, "messages")
    weights = [_weight(m, i) for i, m in enumerate(raw or ())]
    return make_conversation(messages, values.get("tools") or values.get("functions"), weights=weights)


def read_messages(raw: object, place: str) -> list[dict[str, Any]]:
    """OpenAI messages, checked: role, text content, tool calls with their arguments as objects."""
    if not isinstance(raw, list) or not raw:
        raise broken_row("expected a list of messages, at least one", raw, place)
    return [read_message(message, f"{place}[{i}]") for i, message in enumerate(raw)]


def read_message(raw: object, place: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise broken_row("a message must be an object with role and content", raw, place)
    role = "tool" if raw.get("role") == "function" else raw.get("role")
    if role not in ROLES:
        hint = suggest_nearest(role, ROLES) if isinstance(role, str) else f"Known: {', '.join(ROLES)}."
        raise LuthierError("data-row", "no such role", where=f"{place}.role", found=role, remedy=hint)
    calls = _calls(raw, place)
    content = _content(raw.get("content"), f"{place}.content", optional=bool(calls))
    if calls and role != "assistant":
        raise broken_row("only the assistant calls tools", role, place)
    kept = {key: raw[key] for key in KEPT if isinstance(raw.get(key), str)}
    return {"role": role, "content": content, **kept, **({"tool_calls": calls} if calls else {})}


def _content(raw: object, place: str, optional: bool) -> str:
    """The text; that of text parts joined. Null is no text where there are tool calls."""
    if isinstance(raw, str):
        return raw
    if raw is None and optional:
        return ""
    if isinstance(raw, list) and raw:
        return "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(raw))
    raise broken_row("content must be text", raw, place)


def _part(part: object, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise broken_row("only text parts can be trained on", part, place)


def _calls(raw: dict[str, Any], place: str) -> list[dict[str, Any]]:
    calls = raw.get("tool_calls") or ([{"function": raw["function_call"]}] if raw.get("function_call") else [])
    if not isinstance(calls, list):
        raise broken_row("tool_calls must be a list", calls, f"{place}.tool_calls")
    return [_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _call(call: object, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise broken_row("a tool call must name a function", call, place)
    made = {"type": "function", "function": {"name": function["name"], "arguments": _arguments(function)}}
    has_id = isinstance(call, dict) and isinstance(call.get("id"), str)
    return {"id": call["id"], **made} if has_id else made  # type: ignore[index]


def _arguments(function: dict[str, Any]) -> Any:
    """The arguments as an object, which templates expect; OpenAI's files hold them as JSON text."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments  # what a model wrote, though it is no JSON
        return parsed if isinstance(parsed, dict) else arguments
    return {} if arguments is None else arguments


def _weight(message: dict[str, Any], index: int) -> object:
    weight = message.get("weight")
    if weight in (None, 0, 1):
        return weight
    raise broken_row("a message's weight must be 0 or 1", weight, f"messages[{index}].weight")


def read_tools(raw: object) -> list[dict[str, Any]] | None:
    """Tool schemas, also as JSON text; a bare function is wrapped as OpenAI does."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw) if raw.strip() else None
        except (ValueError, RecursionError):
            raise broken_row("tools is not JSON", raw, "tools") from None
    if not raw:
        return None
    if not isinstance(raw, list) or not all(isinstance(tool, dict) for tool in raw):
        raise broken_row("tools must be a list of objects", raw, "tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in raw]


def from_sharegpt(values: dict[str, Any]) -> Conversation:
    raw = values.get("conversations")
    if not isinstance(raw, list) or not raw:
        raise broken_row("expected a list of turns, at least one", raw, "conversations")
    messages = [_turn(turn, f"conversations[{i}]") for i, turn in enumerate(raw)]
    if isinstance(values.get("system"), str) and values["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": values["system"]})
    return make_conversation(messages, values.get("tools"))


def _turn(turn: object, place: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise broken_row("a turn must be an object with from and value", turn, place)
    speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        hint = suggest_nearest(speaker, SPEAKERS) if isinstance(speaker, str) else f"Known: {', '.join(SPEAKERS)}."
        raise LuthierError("data-row", "no such speaker", where=f"{place}.from", found=speaker, remedy=hint)
    if not isinstance(value, str):
        raise broken_row("value must be text", value, f"{place}.value")
    return _function_call(value, place) if role == "function_call" else {"role": role, "content": value}


def _function_call(value: str, place: str) -> dict[str, Any]:
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        raise broken_row("a function call must be JSON", value, f"{place}.value") from None
    calls = parsed if isinstance(parsed, list) else [parsed]
    made = [_call(call, f"{place}.value") for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": made}


def from_chatml(values: dict[str, Any]) -> Conversation:
    """The turns of ChatML text; anything outside of turns is an error."""
    text, end = values.get("text"), 0
    if not isinstance(text, str):
        raise broken_row("text must be ChatML text", text, "text")
    messages = []
    while match := CHATML.match(text, end):
        messages.append(read_message({"role": match[1].strip(), "content": match[2]}, f"turn {len(messages) + 1}"))
        end = match.end()
    if text[end:].strip() or not messages:
        raise broken_row("the text does not go on as <|im_start|>role … <|im_end|>", text[end : end + 60], "text")
    return make_conversation(messages)
