"""A stream of text: the tokens of an answer as text, piece by piece, each as soon as it cannot change any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

UNFINISHED: Final = "\ufffd"  # the character that stands for bytes of an incomplete character


class TextStream(BaseStreamer):
    """Takes the tokens of one answer from transformers' generation, and hands on their text.

    Two windows of tokens are decoded, with and without those that are new, since the text of a token depends on those
    before it (a space, a byte of a character).
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None = None) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self._told = ""
        self._window = self._read = 0  # the start of the window, and the text of it already handed on
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the next tokens; the first ones are the prompt's."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.ids += value.flatten().tolist()
        if self.on_text is None:
            return
        before = self._decode(self.ids[self._window : self._read])
        text = self._decode(self.ids[self._window :])
        if len(text) > len(before) and not text.endswith(UNFINISHED):
            self._tell(text[len(before) :])
            self._window, self._read = self._read, len(self.ids)

    def end(self) -> None:
        """Nothing is left to do here: the text is finished by whoever asked for it."""

    def finish_text(self) -> str:
        """Return the whole text; what of it was not handed on yet is."""
        text = self._decode(self.ids)
        if self.on_text is not None and text.startswith(self._told):
            self._tell(text[len(self._told) :])
        return text

    def _tell(self, piece: str) -> None:
        if piece and self.on_text is not None:
            self._told += piece
            self.on_text(piece)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
