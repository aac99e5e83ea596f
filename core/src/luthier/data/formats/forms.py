"""The forms that every format is converted to: conversation, completion, document, tokens, pair and judged answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import attrs

Side = list[dict[str, Any]] | str  # messages, or a plain text


@attrs.frozen(kw_only=True)
class Form:
    """One row of any format, with what the loss demands of it beyond the format's own columns."""

    where: str = ""
    columns: Mapping[str, bool | int | float] = attrs.field(factory=dict)
    texts: Mapping[str, str] = attrs.field(factory=dict)  # further documents of its unit, by name
    settings: Mapping[str, Any] = attrs.field(factory=dict)  # variables that the row sets for the chat template
    weight: float = 1.0  # the row's weight in the loss

    @property
    def answers(self) -> bool:
        """Return True if the row has something that can be supervised."""
        return True


@attrs.frozen(kw_only=True)
class Conversation(Form):
    """Messages for the chat template. `trained` says of each message whether its text is supervised.

    `flags` are the weights that the row gives its messages, None for a message without one; empty if no message has
    one. With `may_be_empty` an answer without text counts: its stop token is supervised.
    """

    messages: tuple[dict[str, Any], ...]
    trained: tuple[bool, ...]
    tools: list[dict[str, Any]] | None = None
    may_be_empty: bool = False
    flags: tuple[float | None, ...] = ()

    def with_messages(self, messages: Iterable[dict[str, Any]]) -> Conversation:
        """Return the conversation with its messages replaced. It is fast, because it is called for every row."""
        return Conversation(
            messages=tuple(messages), trained=self.trained, tools=self.tools, may_be_empty=self.may_be_empty,
            flags=self.flags, where=self.where, columns=self.columns, texts=self.texts, settings=self.settings,
            weight=self.weight,
        )  # fmt: skip

    @property
    def answers(self) -> bool:
        """Return True if a supervised message has a text or a call."""
        return bool(self._answers)

    @property
    def _answers(self) -> list[int]:
        pairs = enumerate(zip(self.messages, self.trained, strict=True))
        return [i for i, (m, on) in pairs if on and (m.get("content") or m.get("tool_calls") or self.may_be_empty)]

    def with_answers(self, chosen: Collection[int]) -> Conversation:
        """Return the conversation with only these messages supervised, all of which are supervised already."""
        return attrs.evolve(self, trained=tuple(on and i in chosen for i, on in enumerate(self.trained)))

    def last_alone(self) -> Conversation:
        """Return the conversation with only its last answer supervised."""
        return self.with_answers(self._answers[-1:])

    def by_weight(self) -> list[tuple[float, Conversation]]:
        """Return the conversation once for each weight of its answers, with the answers of that weight supervised."""
        weights = {i: self._weight(i) for i in self._answers}
        own = {weight: [i for i, w in weights.items() if w == weight] for weight in weights.values()}
        if len(own) < 2:
            return [(weight, self) for weight in own] or [(1.0, self)]
        return [(weight, self.with_answers(answers)) for weight, answers in own.items()]

    def _weight(self, index: int) -> float:
        flag = self.flags[index] if self.flags else None
        return 1.0 if flag is None else flag


@attrs.frozen(kw_only=True)
class Completion(Form):
    """A plain text and its continuation, which is supervised."""

    prompt: str
    completion: str

    @property
    def answers(self) -> bool:
        return bool(self.completion)


@attrs.frozen(kw_only=True)
class Instruction(Form):
    """An Alpaca row, written by the chat template if there is one, else as the classic Alpaca prompt."""

    instruction: str
    input: str
    output: str
    system: str = ""
    tools: list[dict[str, Any]] | None = None
    history: tuple[tuple[str, str], ...] = ()  # earlier questions with their answers

    @property
    def answers(self) -> bool:
        return bool(self.output)


@attrs.frozen(kw_only=True)
class Document(Form):
    """A text of which every token is supervised."""

    text: str

    @property
    def answers(self) -> bool:
        return bool(self.text.strip())


@attrs.frozen(kw_only=True)
class Tokens(Form):
    """Ids and unshifted labels from the row, unchanged."""

    input_ids: list[int]
    labels: list[int]

    @property
    def answers(self) -> bool:
        return any(label != -100 for label in self.labels[1:])

    def last_alone(self) -> Tokens:
        """Return the row with only the last unbroken run of its labels."""
        end = next((i for i in range(len(self.labels), 0, -1) if self.labels[i - 1] != -100), 0)
        start = next((i for i in range(end, 0, -1) if self.labels[i - 1] == -100), 0)
        ignored = [-100] * len(self.labels)
        return attrs.evolve(self, labels=ignored[:start] + self.labels[start:end] + ignored[end:])


@attrs.frozen(kw_only=True)
class Pair(Form):
    """Two answers to one prompt. `has_prompt` is False if the prompt is only what both texts begin with."""

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
    """A row of which the loss reads only the texts and columns that it names."""
