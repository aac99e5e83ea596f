"""Calls of a chat template: what it writes for messages, with every error that it raises turned into one of the row."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from luthier.errors import LuthierError, show_value

Messages = Sequence[dict[str, Any]]
Settings = Mapping[str, Any]
NONE: Final[Settings] = {}
OWN: Final = frozenset((
    "conversation", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
))  # fmt: skip  # that are transformers' own, and no template's


def render_messages(
    tokenizer: Any, given: str | None, messages: Messages, tools: Any, prompt: bool, settings: Settings
) -> str:
    """Return the messages as a template writes them. `given` is a template other than the tokenizer's own, or None."""
    if messages and _is_plain(tokenizer) and not settings.keys() & OWN:
        return guard_rendering(lambda: _render_plain(tokenizer, given, messages, tools, prompt, settings))
    own = {"tools": tools, "chat_template": given, "add_generation_prompt": prompt, "tokenize": False}
    return guard_rendering(lambda: tokenizer.apply_chat_template(list(messages), **(dict(settings) | own)))


def _is_plain(tokenizer: Any) -> bool:
    """Return True if a tokenizer renders exactly as transformers itself does."""
    transformers = sys.modules.get("transformers")  # loaded already if the tokenizer is one of transformers'
    if transformers is None or not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        return False
    own = getattr(type(tokenizer), "apply_chat_template", None)
    return own is transformers.PreTrainedTokenizerBase.apply_chat_template


def renders_plainly(tokenizer: Any, settings: Settings) -> bool:
    """Return True if `render_messages` renders by the text of the template and by these settings, and nothing else."""
    own = hasattr(tokenizer, "render_tagged")  # of a tokenizer that was read without transformers
    return (own or _is_plain(tokenizer)) and not settings.keys() & OWN


def _render_plain(
    tokenizer: Any, given: str | None, messages: Messages, tools: Any, prompt: bool, settings: Settings
) -> str:
    """Do what `apply_chat_template` does with messages that are dicts, without searching them for other objects."""
    from luthier.data.tokenise.plain.plain_jinja import render_chat

    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    text = tokenizer.get_chat_template(given, tools)
    variables = {**tokenizer.special_tokens_map, **settings, "tools": tools, "add_generation_prompt": prompt}
    if tools is None and all(type(value) is str for message in chat for value in message.values()):
        return render_chat(text, chat, {**variables, "documents": None})[0]  # in half of the time
    from transformers.utils.chat_template_utils import render_jinja_template

    # what is not text may be any object, which transformers keeps from the template
    rendered: Any = render_jinja_template(conversations=[chat], chat_template=text, **variables)
    return str(rendered[0][0])  # the first value is the text, the second the places of generation tags


def guard_rendering(render: Any) -> Any:
    """Return what the template writes. Raises `data-row` if it refuses, and `template-unprovable` if it is invalid."""
    import jinja2

    try:
        return render()
    except jinja2.TemplateSyntaxError as error:
        problem = f"the chat template is not valid Jinja: {error}"
        raise LuthierError("template-unprovable", problem, remedy="Correct the template.") from None
    except Exception as error:  # a template may compute anything, and so may raise anything
        reason = str(error) if isinstance(error, jinja2.TemplateError) and str(error) else typed_reason(error)
        problem = f"the chat template refuses this conversation: {reason}"
        raise LuthierError("data-row", problem, remedy="Change the row, or use a template that takes it.") from None


def typed_reason(error: Exception) -> str:
    """Return an exception of any library as one line, with its kind."""
    return f"{type(error).__name__}: {show_value(str(error), 200)[1:-1]}".removesuffix(": ")
