"""Checks of a row, and of a whole file of rows, by a service's rules."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, Final

from luthier.jobs.rows.service_rows import PAIRED
from luthier.plugins.providing.job_records import DataRules, Finding, ServiceRow

CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
CHARACTERS: Final = 4  # characters per token, an estimate if no tokenizer is asked


def check_row(row: ServiceRow, rules: DataRules) -> Iterator[Finding]:
    """Yield what is wrong with a row: its form, its roles and their order, empty or unprintable text, its length."""
    if row.form not in (*rules.forms, PAIRED):
        yield _error("form", f"the service takes no {row.form} rows; it takes: {', '.join(rules.forms)}", row)
        return
    if row.form == PAIRED:
        yield from _check_pair(row, rules)
    elif row.form == "conversation":
        yield from _check_turns(row, row.messages, rules)
        if not any(on and _says(m) for on, m in zip(row.trained, row.messages, strict=True)):
            yield _error("no-answer", "no message of the assistant is trained on", row)
    elif not row.text.strip():
        yield _error("empty", "the text is empty", row)
    if row.tools and not rules.tools:
        yield _error("tools", "tools are not taken", row)
    if CONTROL.search(_all_text(row)):
        yield _error("control", "the text contains a control character", row)
    reserved = next((text for text in rules.reserved if text in _all_text(row)), None)
    if reserved is not None:
        yield _error("reserved", f"the text contains {reserved!r}, which the service reads as a control mark", row)
    tokens = estimate_tokens(row)
    if rules.max_row_tokens is not None and tokens > rules.max_row_tokens:
        yield _error("overlong", f"about {tokens} tokens; the service takes at most {rules.max_row_tokens}", row)


def _check_turns(row: ServiceRow, messages: tuple[dict[str, Any], ...], rules: DataRules) -> Iterator[Finding]:
    asked: set[str] = set()
    for number, message in enumerate(messages):
        role, place = message["role"], f"messages[{number}]"
        if role in ("system", "developer") and number and rules.system_first:
            yield _error("order", f"{place}: a system message must be the first message", row)
        if role == "tool":
            call = message.get("tool_call_id")
            if call is not None and call not in asked:
                yield _error("tool-call", f"{place}: no earlier tool call has the id {call!r}", row)
        if role == "user" and not str(message.get("content", "")).strip():
            yield _error("empty", f"{place}: the user says nothing", row)
        asked |= {call["id"] for call in message.get("tool_calls") or () if call.get("id")}
    if messages and messages[-1]["role"] != "assistant" and row.form == "conversation":
        yield _error("order", "the last message must be the assistant's", row)
    if not any(m["role"] in ("user", "tool") for m in messages):
        yield _error("order", "there is no message of the user", row)
    if row.form == "conversation" and not rules.weights and _partly_trained(row):
        problem = "a message of the assistant is not trained on here, but the service would train on it"
        yield _error("weights", problem, row)


def _partly_trained(row: ServiceRow) -> bool:
    return any(m["role"] == "assistant" and not on for on, m in zip(row.trained, row.messages, strict=True))


def _check_pair(row: ServiceRow, rules: DataRules) -> Iterator[Finding]:
    if row.chosen == row.rejected:
        yield _error("equal-pair", "chosen and rejected are the same", row)
    for name, side in (("chosen", row.chosen), ("rejected", row.rejected)):
        if not any(_says(message) for message in side):
            yield _error("empty", f"{name} is empty", row)
    yield from _check_turns(row, row.messages, rules)


def check_counts(rows: int, size: int, rules: DataRules, where: str, *, validation: bool) -> Iterator[Finding]:
    """Yield what is wrong with the number of rows and the size of the file."""
    most = rules.max_validation_rows if validation else rules.max_rows
    if not validation and rows < rules.min_rows:
        yield _fault("too-few", f"{rows} rows; the service needs at least {rules.min_rows}", where)
    if most is not None and rows > most:
        yield _fault("too-many", f"{rows} rows; the service takes at most {most}", where)
    if rules.max_bytes is not None and size > rules.max_bytes:
        yield _fault("too-large", f"{size} bytes; the service takes at most {rules.max_bytes}", where)


def hash_row(row: ServiceRow) -> bytes:
    """Return 16 bytes that are equal for rows with the same content."""
    said = [row.form, row.messages, row.prompt, row.text, row.chosen, row.rejected, row.tools]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).digest()[:16]


def estimate_tokens(row: ServiceRow) -> int:
    """Return an estimate of a row's tokens: a quarter of its characters, and four for each message."""
    messages = (*row.messages, *row.chosen, *row.rejected)
    return max(1, len(_all_text(row)) // CHARACTERS + 4 * len(messages))


def _all_text(row: ServiceRow) -> str:
    messages = (*row.messages, *row.chosen, *row.rejected)
    calls = [json.dumps(m["tool_calls"], default=str) for m in messages if m.get("tool_calls")]
    return "".join([row.prompt, row.text, *(str(m.get("content") or "") for m in messages), *calls])


def _says(message: dict[str, Any]) -> bool:
    return bool(str(message.get("content") or "").strip() or message.get("tool_calls"))


def _error(rule: str, problem: str, row: ServiceRow) -> Finding:
    return Finding(level="error", rule=rule, message=problem, where=row.where)


def _fault(rule: str, problem: str, where: str) -> Finding:
    return Finding(level="error", rule=rule, message=problem, where=where)
