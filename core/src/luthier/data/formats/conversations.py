"""Rows that are conversations: OpenAI messages with tools, ShareGPT, and ChatML text."""

from __future__ import annotations

import re
from typing import Any, Final

from luthier.data.formats.beside import Beside, has_value
from luthier.data.formats.forms import Conversation
from luthier.data.formats.message_flags import Flags, read_flags
from luthier.data.read.jsonfiles import embedded_json
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
    "developer": "developer",
    "function_call": "function_call",
    "tool_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
KEPT: Final = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
TEXT_PARTS: Final = ("text", "input_text", "output_text", None)  # types of parts of a content
CHATML: Final = re.compile(r"\s*<\|im_start\|>([^\n]*)\n(.*?)<\|im_end\|>", re.DOTALL)


MEDIA: Final = ("image", "images", "audio", "audios", "video", "videos")


def make_conversation(
    messages: list[dict[str, Any]], beside: Beside | None = None, context: int = 0, flags: Flags = ()
) -> Conversation:
    """Return a conversation of checked messages.

    The first `context` of them are supervised only if their flag says so.
    """
    flags = flags or (None,) * len(messages)
    pairs = enumerate(zip(messages, flags, strict=True))
    trained = [m["role"] == "assistant" and (i >= context if flag is None else flag > 0) for i, (m, flag) in pairs]
    beside = beside or Beside()
    said = beside.before(messages)
    added = len(said) - len(messages)
    has_flags = any(flag is not None for flag in flags)
    return Conversation(
        messages=tuple(said),
        trained=(*([False] * added), *trained),
        flags=(*([None] * added), *flags) if has_flags else (),
        tools=beside.tools,
    )


def from_messages(values: dict[str, Any]) -> Conversation:
    raw = _parsed_list(values.get("messages"), "messages")
    messages = read_messages(raw, "messages")
    return make_conversation(messages, Beside.of(values), flags=read_flags(raw, "messages"))  # type: ignore[arg-type]


def _parsed_list(value: object, place: str) -> object:
    """Return the list that a text is as JSON, which is how tables write lists; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    return embedded_json(value, place)


def plain_conversation(values: dict[str, Any], where: str) -> Conversation | None:
    """Return what `from_messages` returns for a row of messages that have a role and a text and nothing else.

    None for any other row. Most rows are such, and this takes a fifth of the time.
    """
    raw = values.get("messages")
    if len(values) != 1 or type(raw) is not list or not raw:
        return None
    messages, trained = [], []
    for message in raw:
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if type(role) is not str or role not in ROLES or type(content) is not str:
            return None
        messages.append({"role": role, "content": content})
        trained.append(role == "assistant")
    return Conversation(messages=tuple(messages), trained=tuple(trained), where=where)


def read_messages(raw: object, place: str) -> list[dict[str, Any]]:
    """Return OpenAI messages, checked: role, text content, and tool calls with their arguments as objects."""
    if not isinstance(raw, list) or not raw:
        raise broken_row("expected a list of messages, at least one", raw, place)
    return [read_message(message, f"{place}[{i}]") for i, message in enumerate(raw)]


def read_message(raw: object, place: str, said: str = "content") -> dict[str, Any]:
    """Return one message, checked. `said` is the name of the field that holds its content."""
    if not isinstance(raw, dict):
        raise broken_row("a message must be an object with role and content", raw, place)
    role = "tool" if raw.get("role") == "function" else raw.get("role")
    if role not in ROLES:
        hint = suggest_nearest(role, ROLES) if isinstance(role, str) else f"Known: {', '.join(ROLES)}."
        raise LuthierError("data-row", "no such role", where=f"{place}.role", found=role, remedy=hint)
    calls = _calls(raw, place)
    _check_media(raw, place)
    content = _content(raw.get("content"), f"{place}.{said}", optional=bool(calls))
    if calls and role != "assistant":
        raise broken_row("only the assistant calls tools", role, place)
    message = {key: raw[key] for key in KEPT if isinstance(raw.get(key), str)}
    return {"role": role, "content": content, **message, **({"tool_calls": calls} if calls else {})}


def _check_media(raw: dict[str, Any], place: str) -> None:
    for name in MEDIA:
        if has_value(raw.get(name)):
            raise broken_row("only text is trained, but the message has more", raw[name], f"{place}.{name}")


def _content(raw: object, place: str, optional: bool) -> str:
    """Return the text, joined if it consists of text parts. Null is allowed if there are tool calls."""
    if isinstance(raw, str):
        return raw
    if raw is None and optional:
        return ""
    if isinstance(raw, list) and raw:
        return "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(raw))
    raise broken_row(f"{place.rpartition('.')[2]} must be text", raw, place)


def _part(part: object, place: str) -> str:
    if not isinstance(part, dict):
        raise broken_row("a part must be an object with type and text", part, place)
    if part.get("type") not in TEXT_PARTS:
        raise broken_row("only text parts can be trained on", part, place)
    _check_media(part, place)
    if isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    fields = ", ".join(repr(key) for key in part if key != "type") or "nothing"
    raise broken_row(f"the text of a part must be under 'text', but this one has {fields}", part, place)


def _calls(raw: dict[str, Any], place: str) -> list[dict[str, Any]]:
    calls = _parsed_calls(raw.get("tool_calls"), f"{place}.tool_calls")
    calls = calls or ([{"function": raw["function_call"]}] if raw.get("function_call") else [])
    if not isinstance(calls, list):
        raise broken_row("tool_calls must be a list", calls, f"{place}.tool_calls")
    return [_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _parsed_calls(calls: object, place: str) -> object:
    """Return a list of calls, of which one may stand alone, and which tables write as JSON text; else the value."""
    if isinstance(calls, str) and calls.strip():
        calls = embedded_json(calls, place, "tool_calls is not JSON")
    return [calls] if isinstance(calls, dict) else calls


def _call(call: object, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise broken_row("a tool call must name a function", call, place)
    made = {"type": "function", "function": {"name": function["name"], "arguments": _arguments(function, place)}}
    has_id = isinstance(call, dict) and isinstance(call.get("id"), str)
    return {"id": call["id"], **made} if has_id else made  # type: ignore[index]


def _arguments(function: dict[str, Any], place: str) -> dict[str, Any]:
    """Return the arguments as an object, which templates expect.

    OpenAI's files hold JSON text, empty for no arguments.
    """
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = embedded_json(arguments, f"{place}.arguments", "the arguments of a tool call are not JSON")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if not isinstance(arguments, dict):
        raise broken_row("the arguments of a tool call must be an object", arguments, f"{place}.arguments")
    return arguments


def from_sharegpt(values: dict[str, Any]) -> Conversation:
    raw = _parsed_list(values.get("conversations"), "conversations")
    if not isinstance(raw, list) or not raw:
        raise broken_row("expected a list of turns, at least one", raw, "conversations")
    messages = [_turn(turn, f"conversations[{i}]") for i, turn in enumerate(raw)]
    return make_conversation(messages, Beside.of(values), flags=read_flags(raw, "conversations"))


def _turn(turn: object, place: str) -> dict[str, Any]:
    """Return a turn as a message: `from` and `value` are role and content; the rest is read as in messages."""
    if not isinstance(turn, dict):
        raise broken_row("a turn must be an object with from and value", turn, place)
    speaker, said = _either(turn, "from", "role", place), _either(turn, "value", "content", place)
    role = SPEAKERS.get(turn[speaker]) if isinstance(turn.get(speaker), str) else None
    if role is None:
        speaker_name = turn.get(speaker)
        hint = (
            suggest_nearest(speaker_name, SPEAKERS)
            if isinstance(speaker_name, str)
            else f"Known: {', '.join(SPEAKERS)}."
        )
        raise LuthierError("data-row", "no such speaker", where=f"{place}.{speaker}", found=speaker_name, remedy=hint)
    message: dict[str, Any] = {**turn, "role": role, "content": turn.get(said)}
    if role == "function_call":
        message |= {
            "role": "assistant",
            "content": None,
            "tool_calls": _function_calls(turn.get(said), f"{place}.{said}"),
        }
    return read_message(message, place, said)


def _either(turn: dict[str, Any], ours: str, other: str, place: str) -> str:
    """Return the one of two names that has a value. Raises `data-row` if both have one and they differ."""
    first, second = turn.get(ours), turn.get(other)
    if first is not None and second is not None and first != second:
        raise broken_row(f"{ours} and {other} have different values", [first, second], place)
    return other if first is None and second is not None else ours


def _function_calls(value: object, place: str) -> list[Any]:
    if not isinstance(value, str):
        raise broken_row("value must be text", value, place)
    parsed = embedded_json(value, place, "a function call must be JSON")
    calls = parsed if isinstance(parsed, list) else [parsed]
    return [_call(call, place) for call in calls]


def from_chatml(values: dict[str, Any]) -> Conversation:
    """Return the turns of ChatML text. Any text outside of turns is an error."""
    text, end = values.get("text"), 0
    if not isinstance(text, str):
        raise broken_row("text must be ChatML text", text, "text")
    messages: list[dict[str, Any]] = []
    while match := CHATML.match(text, end):
        messages.append(read_message({"role": match[1].strip(), "content": match[2]}, f"turn {len(messages) + 1}"))
        end = match.end()
    if text[end:].strip() or not messages:
        raise broken_row("the text does not continue with <|im_start|>role … <|im_end|>", text[end : end + 60], "text")
    return make_conversation(messages, Beside.of(values))
