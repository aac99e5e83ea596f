"""Roles whose messages are supervised, where the recipe's `train_on` names them."""

from __future__ import annotations

from collections.abc import Collection

import attrs

from luthier.data.formats.documents import alpaca_conversation
from luthier.data.formats.forms import Conversation, Form, Instruction
from luthier.data.read.row import broken_row


def named_roles(train_on: str | Collection[str]) -> frozenset[str]:
    """Return the roles that `train_on` names; none where it is a word."""
    return frozenset() if isinstance(train_on, str) else frozenset(train_on)


def supervise_roles(form: Form, roles: Collection[str], *, has_template: bool) -> Conversation:
    """Return the conversation with the messages of these roles supervised, unless a message's flag says otherwise.

    Of the assistant's, those that would be supervised anyway. Raises `data-row` for a row without messages.
    """
    if isinstance(form, Instruction) and has_template:
        form = alpaca_conversation(form)
    if not isinstance(form, Conversation):
        remedy = "Give messages, or set train_on: assistant or all."
        raise broken_row("train_on names roles, and the row has no messages", sorted(roles), form.where, remedy)
    flags = form.flags or (None,) * len(form.messages)
    trained = []
    for message, is_answer, flag in zip(form.messages, form.trained, flags, strict=True):
        if message["role"] == "assistant":
            trained.append(is_answer and "assistant" in roles)
        else:
            trained.append(message["role"] in roles and bool(message["content"].strip()) and (flag is None or flag > 0))
    return attrs.evolve(form, trained=tuple(trained))
