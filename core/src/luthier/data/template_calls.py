"""Calls of a chat template: what it writes for messages, with every error that it raises turned into one of the row."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from luthier.errors import LuthierError, show_value

Messages = Sequence[dict[str, Any]]
Settings = Mapping[str, Any]
NONE: Final[Settings] = {}
PROBE: Final = "qwj7"  # a text that no template contains
MOST: Final = 256  # the most templates that are remembered
OWN: Final = frozenset((
    "conversation", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
))  # fmt: skip  # that are transformers' own, and no template's


_wants_parts: dict[str, bool] = {}  # by a template's text: contents must be lists of parts


def render_messages(
    tokenizer: Any, given: str | None, messages: Messages, tools: Any, prompt: bool, settings: Settings
) -> str:
    """Return the messages as a template writes them. `given` is a template other than the tokenizer's own, or None."""
    messages = fit_contents(tokenizer, given, messages, tools)
    if messages and _is_plain(tokenizer) and not settings.keys() & OWN:
        return guard_rendering(lambda: _render_plain(tokenizer, given, messages, tools, prompt, settings))
    own = {"tools": tools, "chat_template": given, "add_generation_prompt": prompt, "tokenize": False}
    return guard_rendering(lambda: tokenizer.apply_chat_template(list(messages), **(dict(settings) | own)))


def fit_contents(tokenizer: Any, given: str | None, messages: Messages, tools: Any = None) -> Messages:
    """Return the messages with each text as a list of one part, if a template reads contents in that form alone.

    The templates of models that see pictures do so. Other templates get the messages as they are.
    """
    text = _template_text(tokenizer, given, tools) if messages else None
    if text is None:
        return messages
    if text not in _wants_parts:
        if len(_wants_parts) >= MOST:
            _wants_parts.clear()
        _wants_parts[text] = _tells_parts(text) and _reads_parts_alone(tokenizer, text)
    return [_as_parts(message) for message in messages] if _wants_parts[text] else messages


def _template_text(tokenizer: Any, given: str | None, tools: Any) -> str | None:
    """Return the Jinja text that renders; None if the tokenizer has none, which rendering then refuses."""
    own = tokenizer.chat_template if given is None else given
    if isinstance(own, dict):
        own = own.get("tool_use" if tools is not None and "tool_use" in own else "default")
    return own if isinstance(own, str) else None


def _tells_parts(text: str) -> bool:
    """Return True if a template may ask for the type of a part; it is tried only then."""
    return "type" in text and "text" in text


def _reads_parts_alone(tokenizer: Any, text: str) -> bool:
    asked = [{"role": "user", "content": PROBE}]
    return not _writes(tokenizer, text, asked) and _writes(tokenizer, text, [_as_parts(asked[0])])


def _writes(tokenizer: Any, text: str, messages: Messages) -> bool:
    def render() -> str:
        return str(tokenizer.apply_chat_template(list(messages), tools=None, chat_template=text,
                                                 add_generation_prompt=False, tokenize=False))  # fmt: skip

    try:
        return PROBE in guard_rendering(render)
    except LuthierError:
        return False


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


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
