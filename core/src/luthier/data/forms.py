"""The forms that every format is converted to: conversation, completion, document, tokens (and preference pairs)."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Conversation:
    """Messages for the chat template; `trained` says of each message whether its text is supervised."""

    messages: tuple[dict[str, Any], ...]
    trained: tuple[bool, ...]
    tools: list[dict[str, Any]] | None = None
    where: str = ""

    @property
    def answers(self) -> bool:
        """Whether a supervised message says or calls something."""
        pairs = zip(self.messages, self.trained, strict=True)
        return any(on and (m.get("content") or m.get("tool_calls")) for m, on in pairs)


@attrs.frozen(kw_only=True)
class Completion:
    """Plain text and how it goes on; the completion is supervised."""

    prompt: str
    completion: str
    where: str = ""

    @property
    def answers(self) -> bool:
        return bool(self.completion)


@attrs.frozen(kw_only=True)
class Instruction:
    """An Alpaca row: through the chat template where there is one, else the classic Alpaca prompt."""

    instruction: str
    input: str
    output: str
    system: str = ""
    where: str = ""

    @property
    def answers(self) -> bool:
        return bool(self.output)


@attrs.frozen(kw_only=True)
class Document:
    """Text of which every token is supervised."""

    text: str
    where: str = ""

    @property
    def answers(self) -> bool:
        return bool(self.text.strip())


@attrs.frozen(kw_only=True)
class Tokens:
    """Ids and unshifted labels as they came."""

    input_ids: list[int]
    labels: list[int]
    where: str = ""

    @property
    def answers(self) -> bool:
        return any(label != -100 for label in self.labels[1:])


Form = Conversation | Completion | Instruction | Document | Tokens
