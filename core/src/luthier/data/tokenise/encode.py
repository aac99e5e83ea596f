"""Texts with supervised spans as token examples: one BOS, labels by offsets, and each span proven by decoding."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.formats.forms import Completion, Document
from luthier.data.read.row import broken_row
from luthier.data.template_calls import typed_reason
from luthier.data.tokenise.flat.byte_tokens import ByteTokens, find_core
from luthier.data.tokenise.flat.labelled_texts import Labelled, LabelledTexts
from luthier.data.tokenise.supervised_spans import Rendered, Span
from luthier.errors import LuthierError

SHORT = 64  # characters of a text whose tokens are remembered
Tokenised = tuple[Any, list[Span] | None]  # ids in a list or an array, and the range of tokens of each span


@attrs.define
class Encoder:
    """A tokenizer, and what it does by itself, found by trying."""

    tokenizer: Any
    bos: int | None = None  # the id of the BOS, None for none
    adds_bos: bool = False  # True if the tokenizer puts a BOS before plain text
    specials: frozenset[int] = frozenset()
    decodes: bool = False  # True if it decodes exactly as the library tokenizers does
    known: dict[str, list[int]] = attrs.field(factory=dict)
    octets: ByteTokens | None = None  # the bytes of its tokens, if they stand for bytes

    @classmethod
    def of(cls, tokenizer: Any) -> Encoder:
        bos = tokenizer.bos_token_id
        plain = tokenizer("a")["input_ids"]
        adds = bos is not None and len(plain) > 1 and plain[0] == bos
        specials, decodes = frozenset(tokenizer.added_tokens_decoder), _decodes_plainly(tokenizer)
        core = find_core(tokenizer) if decodes or not hasattr(tokenizer, "backend_tokenizer") else None
        octets = None if core is None else ByteTokens.of(tokenizer, core, specials)
        return cls(tokenizer, bos, adds, specials, decodes, octets=octets)

    def prompt(self, text: str) -> list[int]:
        """Return the tokens of a prompt as training puts them before an answer: one BOS, and nothing after it."""
        ids = np.asarray(self._ids([text])["input_ids"][0], np.int32)
        return (ids if self.bos is None else self._one_bos(ids)).tolist()

    def document(self, form: Document) -> Rendered:
        """Return the text and EOS, all supervised."""
        return Rendered(text=self._bare(form.text), spans=(), everything=True, eos=True, where=form.where)

    def completion(self, form: Completion, everything: bool) -> Rendered:
        """Return prompt and completion joined unchanged, and EOS. Raises `template-unprovable` without an EOS."""
        if self.tokenizer.eos_token is None:
            problem, remedy = (
                "the tokenizer has no eos_token to end a completion with",
                "Set the tokenizer's eos_token.",
            )
            raise LuthierError("template-unprovable", problem, where=form.where, remedy=remedy)
        text = form.prompt + self._bare(form.completion)
        span = (len(form.prompt), len(text))
        return Rendered(text=text, spans=(span,), everything=everything, eos=True, where=form.where)

    def _bare(self, text: str) -> str:
        """Return the text without an EOS at its end, because one is added after its tokens."""
        eos = self.tokenizer.eos_token
        while eos is not None and text.rstrip().endswith(eos):
            text = text.rstrip().removesuffix(eos)
        return text

    def encode(self, texts: Sequence[Rendered]) -> tuple[LabelledTexts, set[str]]:
        """Return the tokens and labels of the texts, and the places of rows whose supervised text the tokens lose.

        Texts are tokenised whole. If a span's tokens do not decode to the span, or the prompt before it would have
        other tokens by itself, the text is tokenised piece by piece instead, which makes both true. Each text must be
        encodable.
        """
        tokenised, lossy = self._tokenised(texts) if texts else ([], set[int]())
        eos = self.tokenizer.eos_token_id
        rows = [
            self._labelled(text, ids, spans or [], eos) for text, (ids, spans) in zip(texts, tokenised, strict=True)
        ]
        made = LabelledTexts.of(rows)
        return made, {texts[i].where for i in lossy | self._lacking(texts, made)}

    def _tokenised(self, texts: Sequence[Rendered]) -> tuple[list[Tokenised], set[int]]:
        """Return the proven tokens of each text, and the texts that no tokens reproduce.

        What the tokens' bytes do not prove is tokenised again with offsets, and proven by decoding.
        """
        quick = self._quick(texts)
        rest = [i for i, one in enumerate(quick) if one is None]
        slow = [texts[i] for i in rest]
        tokenised = self._whole(slow) if slow else []
        wrong, lossy = self._unproven(slow, tokenised)
        for i in wrong:
            tokenised[i] = self._piecewise(slow[i])
        lossy |= self._unproven([slow[i] for i in wrong], [tokenised[i] for i in wrong], wrong)[1]
        others = iter(tokenised)
        return [next(others) if one is None else one for one in quick], {rest[i] for i in lossy}

    def _quick(self, texts: Sequence[Rendered]) -> Sequence[Tokenised | None]:
        """Return the tokens of texts that their bytes prove, and None for the others."""
        if self.octets is None:
            return [None] * len(texts)
        try:
            return self.octets.encode(texts, self._alone)
        except Exception:  # of the tokenizer, which refuses a text: the slower way finds out which
            return [None] * len(texts)

    def _lacking(self, texts: Sequence[Rendered], made: LabelledTexts) -> set[int]:
        """Return the texts with a supervised character that has no token."""
        unknown, unwritten = self.tokenizer.unk_token_id, self.tokenizer.unk_token
        if unknown is None:
            return set()
        places = np.searchsorted(made.starts, np.flatnonzero(made.labels == unknown), side="right") - 1
        return {i for i in np.unique(places).tolist() if unwritten not in texts[i].text}

    def _ids(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)

    def _whole(self, texts: Sequence[Rendered]) -> list[Tokenised]:
        """Return each text tokenised whole.

        Spans are None if a prompt before a span would have other tokens by itself.
        """
        try:
            encoded = self._ids([text.text for text in texts])
        except Exception as error:  # each tokenizer raises its own
            raise self._refusal(texts, error) from None
        ids = encoded["input_ids"]
        if not encoded.is_fast:  # without offsets only texts without spans can be tokenised whole
            return [(ids[i], None if text.spans else []) for i, text in enumerate(texts)]
        tokenised = [(ids[i], _token_spans(encoded, i, text.spans)) for i, text in enumerate(texts)]
        heads = [self._heads(encoded, i, text, tokenised[i]) for i, text in enumerate(texts)]
        alone = self._alone({head for row in heads for head, _ in row})
        is_same = [all(alone[head] == tokens for head, tokens in row) for row in heads]
        return [one if whole else (one[0], None) for one, whole in zip(tokenised, is_same, strict=True)]

    def _refusal(self, texts: Sequence[Rendered], error: Exception) -> LuthierError:
        """Return the error for the first text that the tokenizer refuses, which has raised `error` for all of them."""
        refused = texts[0]
        for text in texts:
            try:
                self._ids([text.text])
            except Exception as own:
                refused, error = text, own
                break
        problem = f"the tokenizer refuses this text: {typed_reason(error)}"
        return LuthierError("data-row", problem, where=refused.where, found=refused.text)

    def _heads(self, encoded: Any, row: int, text: Rendered, tokenised: Tokenised) -> list[tuple[str, list[int]]]:
        """Return the text from the last special token before each span up to the span, and its tokens."""
        ids, spans = tokenised
        heads = []
        for (first, _), (start, _) in zip(spans or [], text.spans, strict=False):
            at = next((t for t in range(first - 1, 0, -1) if ids[t] in self.specials), 0)
            begin = encoded.token_to_chars(row, at).start if at else 0
            if start > begin:
                heads.append((text.text[begin:start], ids[at:first]))
        return heads

    def _alone(self, heads: set[str]) -> dict[str, list[int]]:
        """Return the tokens of each head by itself.

        Those of short heads are remembered, because templates repeat them.
        """
        new = sorted(heads - self.known.keys())
        tokens = dict(zip(new, self._ids(new)["input_ids"], strict=True)) if new else {}
        self.known |= {head: ids for head, ids in tokens.items() if len(head) < SHORT and len(self.known) < 1000}
        return {head: tokens.get(head) or self.known[head] for head in heads}

    def _piecewise(self, text: Rendered) -> Tokenised:
        """Return the text tokenised between its spans' borders, as generation tokenises a prompt by itself."""
        borders = [0, *(border for span in text.spans for border in span), len(text.text)]
        pieces = [text.text[a:b] for a, b in zip(borders, borders[1:], strict=False)]
        counted = [self._ids([piece])["input_ids"][0] if piece else [] for piece in pieces]
        ends = np.cumsum([len(piece) for piece in counted]).tolist()
        spans = [(ends[2 * i], ends[2 * i + 1]) for i in range(len(text.spans))]
        return [token for piece in counted for token in piece], spans

    def _unproven(
        self, texts: Sequence[Rendered], tokenised: Sequence[Tokenised], numbers: Sequence[int] | None = None
    ) -> tuple[list[int], set[int]]:
        """Return the texts with a span that its tokens do not decode to, and those where no other tokens would."""
        numbers = range(len(texts)) if numbers is None else numbers
        spans = [(i, a, b) for i, (_, own) in enumerate(tokenised) for a, b in texts[i].spans if own is not None]
        decoded = self._decode([ids[a:b] for ids, own in tokenised for a, b in own or []])
        wrong = {numbers[i] for i, (_, own) in enumerate(tokenised) if own is None}
        lossy: set[int] = set()
        for (i, a, b), given in zip(spans, decoded, strict=True):
            text = texts[i].text[a:b].strip(" ")  # some tokenizers drop a leading space
            if given.strip(" ") != text:
                alone = self._decode(self._ids([texts[i].text[a:b]])["input_ids"])[0]
                (lossy if given.strip(" ") == alone.strip(" ") else wrong).add(numbers[i])
        return sorted(wrong), lossy

    def _decode(self, tokens: list[list[int]]) -> list[str]:
        if not tokens:
            return []
        if self.decodes:  # in one call, without a search for arrays among the tokens
            return self.tokenizer.backend_tokenizer.decode_batch(tokens, skip_special_tokens=False)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _labelled(self, text: Rendered, tokens: Any, spans: Sequence[Span], eos: int | None) -> Labelled:
        """Return the tokens with one BOS, and with an EOS if it follows the text, and the supervised ranges."""
        ended = text.eos and eos is not None
        ids = np.asarray([*tokens, eos] if ended else tokens, np.int32)
        if text.everything:
            spans = [(0, len(ids))]
        elif ended:
            spans = [(a, b + 1) for a, b in spans]
        if self.bos is None:
            return ids, spans
        whole = self._one_bos(ids)
        more = len(whole) - len(ids)
        return whole, spans if not more else [(max(a + more, 0), max(b + more, 0)) for a, b in spans]

    def _one_bos(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the tokens with exactly one BOS in front, if text or tokenizer puts any there."""
        other = np.flatnonzero(ids != self.bos)
        leading = int(other[0]) if len(other) else len(ids)
        if leading == 0 and self.adds_bos:
            return np.concatenate([[self.bos], ids]).astype(np.int32)
        return ids[max(leading - 1, 0) :]


def _decodes_plainly(tokenizer: Any) -> bool:
    """Return True if tokens are decoded as the class of fast tokenizers does, which one example confirms."""
    transformers = sys.modules.get("transformers")  # loaded already if the tokenizer is one of transformers'
    if transformers is None:
        return False
    names, fast = ("decode", "batch_decode", "_decode"), transformers.PreTrainedTokenizerFast
    if not isinstance(tokenizer, fast) or any(getattr(type(tokenizer), n) is not getattr(fast, n) for n in names):
        return False
    try:
        tokens = [tokenizer(" a\u00e9b , c's\n")["input_ids"], sorted(tokenizer.added_tokens_decoder)]
    except Exception:  # it has no token for one of these characters
        return False
    own = tokenizer.batch_decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return bool(own == tokenizer.backend_tokenizer.decode_batch(tokens, skip_special_tokens=False))


def check_text(text: Rendered) -> None:
    """Raise `data-row` for halves of surrogate pairs, which Python strings may hold but no tokenizer takes."""
    try:
        text.text.encode()
    except UnicodeEncodeError as error:
        problem = "the text holds half of a surrogate pair"
        raise broken_row(problem, text.text[error.start - 10 : error.end + 10], text.where) from None


def _token_spans(encoded: Any, row: int, spans: Sequence[Span]) -> list[Span] | None:
    """Return token ranges of character spans; None if a border is inside a token or a span has no token."""
    ranges = []
    for start, end in spans:
        first = next((t for c in range(start, end) if (t := encoded.char_to_token(row, c)) is not None), None)
        last = next(
            (t for c in range(end - 1, start - 1, -1) if (t := encoded.char_to_token(row, c)) is not None), None
        )
        if first is None or last is None:
            return None
        if first and encoded.token_to_chars(row, first).start < start:
            return None
        ranges.append((first, last + 1))
    return ranges
