"""Culprits: the message of a conversation that makes a chat template refuse it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from luthier.data.tokenise.chat_template import ChatTemplate
from luthier.errors import LuthierError


def name_culprit(
    error: LuthierError, messages: Sequence[dict[str, Any]], tools: Any, template: ChatTemplate
) -> LuthierError:
    """Return a template's refusal with the message that causes it, and the id of a call that it may mean."""

    def refusal(end: int, without: int | None = None) -> str | None:
        try:
            template.render([m for i, m in enumerate(messages[:end]) if i != without], tools)
        except LuthierError as early:
            return early.problem
        return None

    ends = range(1, len(messages) + 1) if error.code == "data-row" else ()
    end = next((end for end in ends if refusal(end) == error.problem), None)
    if end is None:
        return error
    # the last one without which the beginning is taken; the template may see the fault only behind it
    culprit = next((i for i in reversed(range(end)) if end > 1 and refusal(end, i) is None), end - 1)
    ids = _call_ids(messages[culprit]) if re.search(r"\bids?\b", error.problem, re.IGNORECASE) else ""
    problem = f"{error.problem} (from messages[{culprit}] on, role {messages[culprit]['role']}{ids})"
    return LuthierError(error.code, problem, found=error.found, remedy=error.remedy)


def _call_ids(message: dict[str, Any]) -> str:
    ids = [call.get("id") for call in message.get("tool_calls", ())] or [message.get("tool_call_id")]
    return f", id {', '.join('none' if one is None else repr(one) for one in ids)}"
