"""The forms that every format is converted to: conversation, completion, document, tokens, pair and judged answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

Side = list[dict[str, Any]] | str  # messages, or plain text


@attrs.frozen(kw_only=True)
class Form:
    """One row of any format, with what the loss asks of it beyond its format's own columns."""

    where: str = ""
    columns: Mapping[str, bool | int | float] = attrs.field(factory=dict)
    texts: Mapping[str, str] = attrs.field(factory=dict)  # further documents of its unit, by name

    @property
    def answers(self) -> bool:
        """True if the row has something that can be supervised."""
        return True


@attrs.frozen(kw_only=True)
class Conversation(Form):
    """Messages for the chat template; `trained` says of each message whether its text is supervised.

    With `may_be_empty` an answer that says nothing counts: its stop token is supervised.
    """

    messages: tuple[dict[str, Any], ...]
    trained: tuple[bool, ...]
    tools: list[dict[str, Any]] | None = None
    may_be_empty: bool = False

    @property
    def answers(self) -> bool:
        """Whether a supervised message says or calls something."""
        pairs = zip(self.messages, self.trained, strict=True)
        return any(on and (m.get("content") or m.get("tool_calls")) for m, on in pairs)


@attrs.frozen(kw_only=True)
class Completion(Form):
    """Plain text and how it goes on; the completion is supervised."""

    prompt: str
    completion: str

    @property
    def answers(self) -> bool:
        return bool(self.completion)


@attrs.frozen(kw_only=True)
class Instruction(Form):
    """An Alpaca row: through the chat template where there is one, else the classic Alpaca prompt."""

    instruction: str
    input: str
    output: str
    system: str = ""

    @property
    def answers(self) -> bool:
        return bool(self.output)


@attrs.frozen(kw_only=True)
class Document(Form):
    """Text of which every token is supervised."""

    text: str

    @property
    def answers(self) -> bool:
        return bool(self.text.strip())


@attrs.frozen(kw_only=True)
class Tokens(Form):
    """Ids and unshifted labels as they came."""

    input_ids: list[int]
    labels: list[int]

    @property
    def answers(self) -> bool:
        return any(label != -100 for label in self.labels[1:])


@attrs.frozen(kw_only=True)
class Pair(Form):
    """Two answers to one prompt. `has_prompt` is False where the prompt is only what both texts begin with."""

    prompt: Side
    chosen: Side
    rejected: Side
    tools: list[dict[str, Any]] | None = None
    has_prompt: bool = True


@attrs.frozen(kw_only=True)
class Judged(Form):
    """One answer to a prompt, with a verdict in the column `label`."""

    prompt: Side
    completion: Side
    tools: list[dict[str, Any]] | None = None


@attrs.frozen(kw_only=True)
class Texts(Form):
    """A row of which the loss reads nothing but the texts and columns that it names."""
