"""Describe a tokenizer for GGUF: tokens with types, merges, special tokens, the chat template."""

from __future__ import annotations

import json
from typing import Any, Final

import attrs
import gguf
from gguf import TokenType
from luthier import LuthierError

from luthier_gguf import Gguf

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SPLITS: Final = {rf"{_WORDS}|\p{{N}}{{1,3}}{_TAIL}": "llama-bpe", rf"{_WORDS}|\p{{N}}{_TAIL}": "qwen2"}
MERGES: Final = (gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
STOP_KEYS: Final = ("eos", "eot", "eom")  # a file can name at most three tokens that end an answer


@attrs.frozen(kw_only=True)
class Vocabulary:
    """The content of a file about the tokenizer. `stops` end an answer; the tokenizer's own end is the first."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    begin: int | None
    pad: int | None
    unknown: int | None
    stops: list[int]
    adds_begin: bool
    adds_end: bool
    template: str | None


def read_vocabulary(model: Any, tokenizer: Any, options: Gguf) -> Vocabulary:
    """Return the parts of the tokenizer. Raises `part-unsupported` if a file cannot describe it."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    merging = definition["model"]
    if merging["type"] != "BPE" or merging.get("byte_fallback"):
        problem = "exporter 'gguf' can write only byte-level BPE tokenizers"
        kind = f"{merging['type']}{' with byte fallback (SentencePiece)' if merging.get('byte_fallback') else ''}"
        raise LuthierError("part-unsupported", problem, where="tokenizer", found=kind, remedy="Merge it instead.")
    tokens, types = _tokens(definition, model.config.vocab_size)
    adds_begin, adds_end = _additions(tokenizer)
    return Vocabulary(
        pre=options.pre_tokenizer if options.pre_tokenizer != "auto" else _pre_tokenizer(definition),
        tokens=tokens,
        types=types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in merging["merges"]],
        begin=tokenizer.bos_token_id,
        pad=tokenizer.pad_token_id,
        unknown=tokenizer.unk_token_id,
        stops=find_stops(model, tokenizer),
        adds_begin=adds_begin,
        adds_end=adds_end,
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def find_stops(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, then those of the model's generation."""
    given = getattr(model.generation_config, "eos_token_id", None)
    further = given if isinstance(given, list) else [given]
    stops = list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *further) if i is not None))
    if len(stops) > len(STOP_KEYS):
        problem = f"{len(stops)} tokens end an answer, but a file can name at most {len(STOP_KEYS)}"
        raise LuthierError("part-unsupported", problem, where="generation_config.eos_token_id", found=stops)
    return stops


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write a vocabulary."""
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name of byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    # written even if it is empty, because readers ask for the key
    writer.add_key_value(gguf.Keys.Tokenizer.MERGES, vocabulary.merges, *MERGES)
    if vocabulary.begin is not None:
        writer.add_bos_token_id(vocabulary.begin)
    for key, stop in zip(STOP_KEYS, vocabulary.stops, strict=False):
        getattr(writer, f"add_{key}_token_id")(stop)
    if vocabulary.pad is not None:
        writer.add_pad_token_id(vocabulary.pad)
    if vocabulary.unknown is not None:
        writer.add_unk_token_id(vocabulary.unknown)
    writer.add_add_bos_token(vocabulary.adds_begin)
    writer.add_add_eos_token(vocabulary.adds_end)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def _tokens(document: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return tokens and types in the order of ids. Ids that only the model has are unused."""
    entries = {number: (text, TokenType.NORMAL) for text, number in document["model"]["vocab"].items()}
    for added in document["added_tokens"]:
        entries[added["id"]] = (added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    if max(entries) >= size:
        problem = f"the tokenizer makes ids up to {max(entries)}, but the model has {size} embeddings"
        raise LuthierError("model-vocabulary", problem, where="tokenizer")
    every = [entries.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(size)]
    return [text for text, _ in every], [int(kind) for _, kind in every]


def _additions(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether a text gets a begin and an end token. Any other addition is refused."""
    bare, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for adds_begin in (False, True):
        for adds_end in (False, True):
            if whole == begin * adds_begin + bare + end * adds_end:
                return adds_begin, adds_end
    problem = "the tokenizer adds more to a text than a begin and an end token"
    raise LuthierError("part-unsupported", problem, where="tokenizer", found=tokenizer.convert_ids_to_tokens(whole))


def _pre_tokenizer(document: dict[str, Any]) -> str:
    """Return llama.cpp's name of the way in which the tokenizer splits text."""
    pre_tokenizer = document["pre_tokenizer"] or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if steps and steps[-1].get("type") == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        kinds, by_words = [step["type"] for step in steps], steps[-1]["use_regex"]
        if kinds == ["ByteLevel"] and by_words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and by_words and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not by_words:
            name = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
            if name and steps[0]["behavior"] == "Isolated":
                return name
    remedy = "Name it with pre_tokenizer: gpt-2, llama-bpe, qwen2 or smollm."
    problem = "llama.cpp's name of this tokenizer's way to split text is not known"
    raise LuthierError("part-unsupported", problem, where="tokenizer", found=json.dumps(pre_tokenizer), remedy=remedy)
