"""A tokenizer read from its files by the library tokenizers alone, if the files describe it completely."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from luthier.data.template_calls import OWN
from luthier.data.tokenise.plain.plain_jinja import Spans, render_chat

if TYPE_CHECKING:
    from luthier.recipe.schema import Model

FILES: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# classes that add nothing of their own to tokenizer.json
CLASSES: Final = ("TokenizersBackend", "PreTrainedTokenizerFast")
EXTRA: Final = ("extra_special_tokens", "additional_special_tokens")
NAMED: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# model types for which transformers takes its own class, whatever the files name
OWN_CLASS: Final = (
    "qwen2",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen4_exp",
    "siglip2",
    "hyperclovax_vision_v2",
)
ALTERING: Final = (  # settings by which transformers deviates from tokenizer.json
    *("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "split_special_tokens"),
    *("auto_map", "model_specific_special_tokens", "fix_mistral_regex", "added_tokens_decoder", "do_lower_case"),
)


def read_tokenizer(spec: Model, template_settings: Mapping[str, Any] | None = None) -> FileTokenizer | None:
    """Return the tokenizer of a model's folder; None if only transformers knows how it tokenises.

    It is None for hub names, for classes that add to their files, for settings of the chat template that mean something
    to transformers, and if the library tokenizers is not installed.
    """
    from importlib.util import find_spec

    from luthier.demo import MODEL

    name = spec.tokenizer or spec.name_or_path
    folder = MODEL if name == "demo" else Path(name).expanduser()
    if (template_settings or {}).keys() & OWN:
        return None
    if not (folder / FILES[0]).is_file() or not all(map(find_spec, ("tokenizers", "jinja2"))):
        return None
    try:
        return FileTokenizer.read(folder)
    except Exception:  # the library tokenizers raises plain ones
        return None  # the code that reads models explains damaged files


class Encodings(dict[str, Any]):
    """Tokenised texts: their ids, and the characters that each token stands for."""

    is_fast = True

    def __init__(self, encodings: Sequence[Any]) -> None:
        super().__init__(input_ids=[encoding.ids for encoding in encodings])
        self._encodings = encodings

    def char_to_token(self, row: int, character: int) -> int | None:
        """Return the token of a character of a text."""
        token: int | None = self._encodings[row].char_to_token(character)
        return token

    def token_to_chars(self, row: int, token: int) -> CharacterSpan:
        """Return the characters of a token."""
        return CharacterSpan(*self._encodings[row].token_to_chars(token))


@attrs.frozen
class CharacterSpan:
    """The characters of a token: the first, and the one after the last."""

    start: int
    end: int


@attrs.define(eq=False)
class FileTokenizer:
    """A tokenizer with the members that the data needs, under the names that transformers gives them."""

    folder: Path
    core: Any = attrs.field(repr=False)  # the object of the library tokenizers
    special_tokens_map: dict[str, str]
    extra_special_tokens: list[str]
    chat_template: Any = attrs.field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> FileTokenizer | None:
        """Read a folder's files; return None if they do not describe the tokenizer completely."""
        from tokenizers import Tokenizer

        settings = _read_object(folder / FILES[1])
        if _read_object(folder / "config.json").get("model_type") in OWN_CLASS or _adds_tokens(folder, settings):
            return None
        named = {**settings, **_read_object(folder / FILES[2])}
        tokens = {f"{name}_token": _text_of(named[f"{name}_token"]) for name in NAMED if named.get(f"{name}_token")}
        extra = [_text_of(token) for name in EXTRA for token in named.get(name) or ()]
        core = Tokenizer.from_file(str(folder / FILES[0]))
        core.no_truncation()
        core.no_padding()
        known = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
        altered = any(named.get(name) not in (None, False, [], {}) for name in ALTERING)
        if settings.get("tokenizer_class") not in CLASSES or altered or not {*tokens.values(), *extra} <= known:
            return None
        own = folder / FILES[3]
        template = own.read_text("utf-8") if own.is_file() else settings.get("chat_template")
        if (folder / "additional_chat_templates").exists() or not isinstance(template, (str, type(None))):
            return None
        return cls(folder, core, tokens, extra, template)

    def __call__(
        self, text: str | list[str], *, add_special_tokens: bool = True, **_: Any
    ) -> Encodings | dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": self.core.encode(text, add_special_tokens=add_special_tokens).ids}
        return Encodings(self.core.encode_batch(text, add_special_tokens=add_special_tokens))

    def __len__(self) -> int:
        size: int = self.core.get_vocab_size(with_added_tokens=True)
        return size

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        decoder: dict[int, Any] = self.core.get_added_tokens_decoder()
        return decoder

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        return [self.core.token_to_id(token) for token in self.all_special_tokens]

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @property
    def unk_token(self) -> str | None:
        return self.special_tokens_map.get("unk_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of(self.eos_token)

    @property
    def unk_token_id(self) -> int | None:
        return self._id_of(self.unk_token)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.core.token_to_id(token)

    def convert_ids_to_tokens(self, token: int) -> str | None:
        text: str | None = self.core.id_to_token(token)
        return text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        text: str = self.core.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def batch_decode(self, rows: Iterable[Sequence[int]], skip_special_tokens: bool = False, **_: Any) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in rows]

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """Return the template to render with. Without one, it raises what transformers raises."""
        if chat_template is None and self.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        return chat_template or self.chat_template

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        tools: Any = None,
        tokenize: bool = False,
        **variables: Any,
    ) -> str:
        """Return the conversation as text."""
        assert not tokenize, "texts are tokenised apart"
        own = (variables.keys() & OWN) - {"add_generation_prompt"}
        if own:
            raise ValueError(f"{', '.join(sorted(own))}: only transformers renders by these, where it is installed")
        given = {"tools": tools, "documents": None, **self.special_tokens_map, **variables}
        chat = [{name: value for name, value in message.items() if value is not None} for message in messages]
        return render_chat(self.get_chat_template(chat_template), chat, given)[0]

    def render_tagged(
        self, template: str, messages: Any, tools: Any, variables: Mapping[str, Any]
    ) -> tuple[str, Spans]:
        """Return the conversation as text, and the spans between generation tags."""
        given = {"tools": tools, "documents": None, "add_generation_prompt": False, **variables}
        return render_chat(template, messages, given, tagged=True)

    def save_pretrained(self, folder: str) -> None:
        """Copy the files that describe the tokenizer."""
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, Path(folder) / name)


def _adds_tokens(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Return True if transformers adds tokens that tokenizer.json does not have, from a file or a setting."""
    suffix = "_token"
    named = (name for name in settings if name.endswith(suffix) and not name.startswith("add_") and settings[name])
    further = any(name.removesuffix(suffix) not in NAMED for name in named)
    return further or (folder / "added_tokens.json").exists()


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def _text_of(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token
