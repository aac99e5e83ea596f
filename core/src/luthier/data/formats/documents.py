"""Rows that are text or ids: raw text, prompt and completion, Alpaca, and pre-tokenised rows."""

from __future__ import annotations

from typing import Any, Final

import attrs

from luthier.data.formats.beside import Beside, is_filled, read_history
from luthier.data.formats.conversations import make_conversation, read_messages
from luthier.data.formats.forms import Completion, Conversation, Document, Instruction, Tokens
from luthier.data.formats.message_flags import Flags, read_flags
from luthier.data.read.row import broken_row
from luthier.errors import LuthierError

IGNORED: Final = -100
MASKS: Final = ("loss_mask", "completion_mask", "assistant_masks")  # columns that say whether each token is supervised
LARGEST: Final = 2**31 - 1  # ids are stored as int32
ALPACA: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def text_of(values: dict[str, Any], *names: str) -> str:
    """Return the text of the first of the columns that is present."""
    name = next((n for n in names if values.get(n) is not None), names[0])
    value = values.get(name)
    if isinstance(value, str):
        return value
    raise broken_row(f"{name} is missing" if value is None else f"{name} must be text", value)


def from_text(values: dict[str, Any]) -> Document:
    return Document(text=text_of(values, "text"))


def from_prompt_completion(values: dict[str, Any]) -> Completion | Conversation:
    """Return plain text joined unchanged, or a conversation that trains the completion's messages.

    It is a conversation if either column is a list of messages, or if the row also has a system prompt or tools.
    """
    prompt, completion, beside = values.get("prompt"), values.get("completion"), Beside.of(values)
    if not isinstance(prompt, list) and not isinstance(completion, list) and not beside:
        return Completion(prompt=text_of(values, "prompt"), completion=text_of(values, "completion"))
    before = as_messages(prompt, "prompt", "user")
    messages = [*before, *as_messages(completion, "completion", "assistant")]
    flags = (*_flags_of(prompt, "prompt"), *_flags_of(completion, "completion"))
    return make_conversation(messages, beside, context=len(before), flags=flags)


def _flags_of(value: object, place: str) -> Flags:
    """Return the flag of each message. A plain text is one message without flag."""
    return (read_flags(value, place) or (None,) * len(value)) if isinstance(value, list) else (None,)


def as_messages(value: object, place: str, role: str) -> list[dict[str, Any]]:
    """Return messages unchanged, and a text as one message of `role`."""
    return [{"role": role, "content": value}] if isinstance(value, str) else read_messages(value, place)


def from_alpaca(values: dict[str, Any]) -> Instruction:
    beside = Beside.of(values)
    return Instruction(
        instruction=text_of(values, "instruction"),
        input=text_of(values, "input") if values.get("input") is not None else "",
        output=text_of(values, "output", "response"),
        system=beside.system,
        tools=beside.tools,
        history=tuple(read_history(values.get("history"))),
    )


def alpaca_conversation(row: Instruction) -> Conversation:
    """Return a conversation: instruction, blank line and input, answered by the output.

    Earlier answers train as well.
    """
    asked = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
    turns = [*row.history, (asked, row.output)]
    roles = ("user", "assistant")
    messages = [{"role": role, "content": said} for turn in turns for role, said in zip(roles, turn, strict=True)]
    made = make_conversation(messages, Beside(system=row.system, tools=row.tools))
    return attrs.evolve(made, where=row.where, settings=row.settings, weight=row.weight)


def alpaca_completion(row: Instruction) -> Completion:
    """Return the prompt of Stanford Alpaca (Taori et al., 2023), for tokenizers without a chat template."""
    prompt = (ALPACA_INPUT if row.input else ALPACA).format(instruction=row.instruction, input=row.input)
    system = f"{row.system}\n\n" if row.system else ""
    return Completion(prompt=system + prompt, completion=row.output, where=row.where)


def from_tokens(values: dict[str, Any]) -> Tokens:
    """Return ids and labels of one length, without padding.

    Without labels, every token of the document is supervised.
    """
    ids = _integers(values.get("input_ids"), "input_ids")
    impossible = next((i for i in ids if not 0 <= i <= LARGEST), None)
    if impossible is not None:
        raise LuthierError("model-vocabulary", "an id is negative or too large", where="input_ids", found=impossible)
    labels = ids if values.get("labels") is None else _integers(values["labels"], "labels")
    mask = None if values.get("attention_mask") is None else _mask(values["attention_mask"], "attention_mask")
    for name, other in (("labels", labels), ("attention_mask", mask or ids)):
        if len(other) != len(ids):
            raise broken_row(f"{name} and input_ids differ in length", [len(other), len(ids)], name)
    _check_length(values.get("len"), ids)
    _check_labels(ids, labels)
    labels = _unmasked(values, labels)
    supervised = [i for i, on in enumerate(mask) if on] if mask else range(len(ids))
    return Tokens(input_ids=[ids[i] for i in supervised], labels=[labels[i] for i in supervised])


def _integers(value: Any, name: str) -> list[int]:
    numbers = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(numbers, (list, tuple)) or not numbers:
        raise broken_row(f"{name} must be a list of ids, at least one", value, name)
    for i, number in enumerate(numbers):
        if type(number) is not int:
            raise broken_row("not a whole number", number, f"{name}[{i}]")
    return list(numbers)


def _mask(value: Any, name: str) -> list[int]:
    """Return ones and zeros, which may be written as true and false."""
    values = value.tolist() if hasattr(value, "tolist") else value
    numbers = [int(v) if isinstance(v, bool) else v for v in values] if isinstance(values, (list, tuple)) else values
    return _integers(numbers, name)


def _unmasked(values: dict[str, Any], labels: list[int]) -> list[int]:
    """Return the labels of tokens that every mask supervises. A row's own labels must agree with its masks."""
    masks = {name: _mask(values[name], name) for name in MASKS if is_filled(values.get(name))}
    for name, mask in masks.items():
        if len(mask) != len(labels):
            raise broken_row(f"{name} and input_ids differ in length", [len(mask), len(labels)], name)
    if not masks:
        return labels
    on = [all(flags) for flags in zip(*masks.values(), strict=True)]
    given = values.get("labels") is not None
    if given and any((label != IGNORED) != flag for label, flag in zip(labels, on, strict=True)):
        raise broken_row("labels and the mask do not supervise the same tokens", labels, next(iter(masks)))
    return [label if flag else IGNORED for label, flag in zip(labels, on, strict=True)]


def _check_length(length: object, ids: list[int]) -> None:
    if length is not None and length != len(ids):
        raise broken_row(f"len differs from the number of ids, {len(ids)}", length, "len")


def _check_labels(ids: list[int], labels: list[int]) -> None:
    """Raise unless each label stands at its own token. Labels shifted for another trainer would be shifted twice."""
    wrong = next((label for label in labels if label != IGNORED and not 0 <= label <= LARGEST), None)
    if wrong is not None:
        raise broken_row("a label must be an id, or -100 where it is not supervised", wrong, "labels")
    own = [(i, label) for i, label in enumerate(labels) if label != IGNORED]
    shifted = all(i + 1 < len(ids) and ids[i + 1] == label for i, label in own)
    if len(own) > 1 and shifted and any(ids[i] != label for i, label in own):
        raise broken_row("the labels are shifted by one; they must stand at their own tokens", labels, "labels")
