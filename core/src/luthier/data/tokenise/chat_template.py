"""The chat template of a run: the tokenizer's own or the recipe's, what it writes, and how it ends an answer."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import attrs

from luthier.data.template_calls import (
    NONE,
    PROBE,
    Messages,
    Settings,
    fit_contents,
    guard_rendering,
    render_messages,
    renders_plainly,
)
from luthier.data.tokenise.rendered_parts import PartFinder
from luthier.data.tokenise.shapes.row_plans import RowPlans
from luthier.data.tokenise.shapes.symbolic_text import Piece, Trace, UnknownText
from luthier.data.tokenise.thoughts import BLOCK, KEYS, join_thought
from luthier.errors import LuthierError

TAGS: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


@attrs.frozen(kw_only=True)
class ChatTemplate:
    """A tokenizer's chat template, and what rendering a probe with it has shown."""

    tokenizer: Any
    given: str | None  # Jinja text that replaces the tokenizer's own, or None
    tail: str  # what it writes after the last answer
    closing: str  # the part of the tail up to the stop token; empty if the template writes none
    stop: str  # the special token that ends an answer
    prompts: bool  # True if it uses add_generation_prompt
    specials: tuple[str, ...]  # the texts of the tokenizer's special tokens, longest first
    settings: Mapping[str, Any] = attrs.field(factory=dict)  # variables set by the recipe, or by a row
    # the same template with other settings, by these settings
    others: dict[str, ChatTemplate] = attrs.field(factory=dict, eq=False, repr=False)
    parts: PartFinder = attrs.field(factory=PartFinder, eq=False, repr=False)  # finds which parts of a row it writes
    plans: RowPlans = attrs.field(factory=RowPlans, eq=False, repr=False)  # what it writes for shapes of rows

    def with_settings(self, settings: Mapping[str, Any]) -> ChatTemplate:
        """Return the template with these variables over its own, probed like any other."""
        if not settings:
            return self
        key = json.dumps(settings, sort_keys=True, default=str)
        if key not in self.others:
            made = load_template(self.tokenizer, self.given, {**self.settings, **settings})
            assert made is not None
            self.others[key] = made
        return self.others[key]

    @property
    def source(self) -> str | dict[str, str]:
        """Return the Jinja text, or the texts of a tokenizer with a separate one for tools."""
        return self.given or self.tokenizer.chat_template

    @property
    def text(self) -> str:
        return self.source if isinstance(self.source, str) else json.dumps(self.source, sort_keys=True)

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def closes(self) -> bool:
        """Return True if the template itself ends answers with a stop token."""
        return bool(self.closing)

    @property
    def tagged(self) -> bool:
        """Return True if the template marks the assistant's text with generation tags."""
        return TAGS.search(self.text) is not None

    def render(self, messages: Messages, tools: list[dict[str, Any]] | None = None, prompt: bool = False) -> str:
        """Return the conversation as text; with `prompt`, up to where the assistant's next answer begins."""
        return render_messages(self.tokenizer, self.given, messages, tools, prompt, self.settings)

    def trace(self, roles: Sequence[str], trace: Trace, prompt: bool = False) -> tuple[Piece, ...]:
        """Return what `render` writes for messages of these roles, with slots in the places of their contents.

        `trace` gets what the template asks about the contents. Raises UnknownText if that cannot be followed.
        """
        from luthier.data.tokenise.shapes.template_trace import trace_template

        if not renders_plainly(self.tokenizer, self.settings):
            raise UnknownText
        variables = {**self.tokenizer.special_tokens_map, **self.settings, "add_generation_prompt": prompt}
        text = self.tokenizer.get_chat_template(self.given, None)
        return trace_template(text, roles, trace, {**variables, "tools": None, "documents": None})

    def tagged_spans(
        self, messages: Messages, tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the conversation as text, and the character spans between generation tags."""
        text = self.tokenizer.get_chat_template(self.given, tools)
        messages = fit_contents(self.tokenizer, self.given, messages, tools)
        variables = self.tokenizer.special_tokens_map | self.settings
        if hasattr(self.tokenizer, "render_tagged"):  # a tokenizer that was read without transformers
            whole, spans = guard_rendering(lambda: self.tokenizer.render_tagged(text, messages, tools, variables))
            return whole, [(start, end) for start, end in spans if end > start]
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = guard_rendering(
            lambda: render_jinja_template(
                conversations=[list(messages)],
                tools=cast(Any, tools),  # transformers' stubs have an invariant list of dicts or functions here
                chat_template=text,
                return_assistant_tokens_mask=True,
                **variables,
            )
        )
        return rendered[0], [(start, end) for start, end in spans[0] if end > start]

    def ending(self, text: str) -> str | None:
        """Return the special token that the text ends with, apart from white space; None if there is none."""
        bare = text.rstrip()
        return next((special for special in (self.stop, *self.specials) if bare.endswith(special)), None)

    def has_special(self, content: str) -> bool:
        return any(first in content for first in self._begins) and any(s in content for s in self.specials)

    @functools.cached_property
    def _begins(self) -> frozenset[str]:
        """Return the first characters of all special tokens, which most texts do not contain."""
        return frozenset(special[:1] for special in self.specials)

    def bare(self, content: str) -> str:
        """Return the content without stop tokens at its end, because the template writes its own."""
        while ended := next((stop for stop in self.stops if content.rstrip().endswith(stop)), None):
            content = content.rstrip().removesuffix(ended)
        return content

    @functools.cached_property
    def stops(self) -> tuple[str, ...]:
        eos = self.tokenizer.eos_token
        return (self.stop,) if eos in (None, self.stop) else (self.stop, eos)

    @functools.cached_property
    def text_arguments(self) -> bool:
        """Return True if the template takes a call's arguments only as JSON text, like DeepSeek's."""
        return not self._calls({"a": 1}) and self._calls('{"a": 1}')

    @functools.cached_property
    def writes_calls(self) -> bool:
        """Return True if it writes the calls of an answer, with arguments as objects or as text."""
        return self._calls({"a": 1}) or self._calls('{"a": 1}')

    def _calls(self, arguments: Any) -> bool:
        call = {"type": "function", "function": {"name": PROBE, "arguments": arguments}, "id": "abcdefgh1"}
        return self._writes({"role": "assistant", "content": "", "tool_calls": [call]})

    @functools.cached_property
    def thought_way(self) -> str:
        """Return the key of an answer's thought that it reads; BLOCK if it writes one in the content; else ""."""
        for way in (*KEYS, BLOCK):
            answer = join_thought(PROBE, {"role": "assistant", "content": "yes"}, way)
            if self._writes(answer):
                return way
        return ""

    def _writes(self, answer: dict[str, Any]) -> bool:
        """Return True if it writes a probe in an answer, in any position where it accepts that answer."""
        asked = {"role": "user", "content": "hi"}
        for before in ([asked], [{"role": "system", "content": "hi"}, asked], []):
            try:
                return PROBE in self.render([*before, answer])
            except LuthierError:
                continue
        return False

    def own_system(self) -> str:
        """Return the system prompt that the template adds by itself; an empty text for none."""
        user = {"role": "user", "content": PROBE}
        try:
            without = self.render([user])
            explicit = self.render([{"role": "system", "content": "sys" + PROBE}, user])
        except LuthierError:
            return ""
        before, probe, after = explicit.partition("sys" + PROBE)
        added = len(without) - len(before) - len(after)
        if not probe or added <= 0 or not without.startswith(before) or not without.endswith(after):
            return ""
        return without[len(before) : len(before) + added]


def load_template(tokenizer: Any, chat_template: str | None = None, settings: Settings = NONE) -> ChatTemplate | None:
    """Return the template to use; None if there is none. `chat_template` is Jinja text or the path of a file of it.

    `settings` are variables for the template. Raises `template-unprovable` if nothing ends its answers.
    """
    given = _chosen_text(tokenizer, chat_template)
    if given is None and not tokenizer.chat_template:
        return None
    tail, closing, prompts = _probe(tokenizer, given, settings)
    stop = max((t for t in _added(tokenizer) if closing.endswith(t)), key=len, default=tokenizer.eos_token)
    if stop is None:
        raise LuthierError(
            "template-unprovable",
            "the chat template ends answers without a special token, and the tokenizer has no eos_token",
            remedy="Set the tokenizer's eos_token, or use a template that closes each answer with one.",
        )
    return ChatTemplate(
        tokenizer=tokenizer,
        given=given,
        tail=tail,
        closing=closing,
        stop=stop,
        prompts=prompts,
        settings=settings,
        specials=tuple(sorted({*tokenizer.all_special_tokens, *_added(tokenizer, True)}, key=len, reverse=True)),
    )


def _chosen_text(tokenizer: Any, chat_template: str | None) -> str | None:
    """Return the requested Jinja text, by name if the tokenizer has several; None for the tokenizer's own."""
    own = tokenizer.chat_template
    if isinstance(own, list):  # the form in tokenizers' files
        own = tokenizer.chat_template = {entry["name"]: entry["template"] for entry in own}
    named = own if isinstance(own, dict) else {}
    if chat_template is not None:
        return named[chat_template] if chat_template in named else template_text(chat_template)
    if named and "default" not in named:
        problem = f"the tokenizer has chat templates named {', '.join(named)}, but none named default"
        remedy = f"Name the one to use: data.chat_template: {next(iter(named))}."
        raise LuthierError("template-missing", problem, where="data.chat_template", remedy=remedy)
    return None


def render_prompt(tokenizer: Any, messages: Messages, settings: Settings = NONE) -> str:
    """Return a conversation as the tokenizer's own template writes it, up to where the next answer begins.

    `settings` are variables for the template.
    """
    return render_messages(tokenizer, None, messages, None, True, settings)


def template_text(chat_template: str) -> str:
    """Return the Jinja text itself, or the text of the file that it names."""
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LuthierError(
            "data-not-found",
            f"the chat template is neither Jinja text nor a file that can be read: {error}",
            where="data.chat_template",
            found=chat_template,
        ) from None


def _added(tokenizer: Any, special: bool = False) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special or not special]


def _probe(tokenizer: Any, given: str | None, settings: Settings = NONE) -> tuple[str, str, bool]:
    """Return what the template writes after an answer, how much of that ends it, and True for add_generation_prompt.

    It is found by trying: what ends an answer is written after the last one and after one that a question follows.
    """
    answer, asked = {"role": "assistant", "content": PROBE}, {"role": "user", "content": "hi"}
    for before in ([asked], [{"role": "system", "content": "hi"}, asked], []):
        try:
            tail = _tail(tokenizer, given, [*before, answer], settings)
            middle = _tail(tokenizer, given, [*before, answer, asked], settings)
            asks = (False, True) if before else ()
            prompts = [render_messages(tokenizer, given, before, None, prompt, settings) for prompt in asks]
        except LuthierError as error:
            if error.code == "template-unprovable":
                raise
            continue
        added = _added(tokenizer)
        closing = _closing(os.path.commonprefix([tail, middle]), added) or _closing(tail, added)
        return tail, closing, bool(prompts) and prompts[0] != prompts[1]
    return "", "", False


def _tail(tokenizer: Any, given: str | None, messages: Messages, settings: Settings) -> str:
    text = render_messages(tokenizer, given, messages, None, False, settings)
    return text.rpartition(PROBE)[2] if PROBE in text else ""


def _closing(tail: str, added: list[str]) -> str:
    """Return the tail up to the end of its first adjacent special tokens; an empty text if it has none."""
    end = begin = len(tail) - len(tail.lstrip())
    while token := max((t for t in added if tail.startswith(t, end)), key=len, default=""):
        end += len(token)
    return tail[:end] if end > begin else ""
