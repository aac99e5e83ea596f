"""Making: forms of rows into token examples, with one tokenizer and template, everything counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import attrs
import numpy as np

from luthier.data.documents import alpaca_completion, alpaca_conversation
from luthier.data.examples import TokenDataset, TokenExample
from luthier.data.forms import Completion, Conversation, Document, Form, Instruction, Tokens
from luthier.data.overlong import fit, overlong_policy
from luthier.data.spans import Rendered, render_conversation
from luthier.data.template import ChatTemplate, load_template
from luthier.data.tokenise import Encoder
from luthier.errors import LuthierError
from luthier.recipe.tree import Data

CHUNK: Final = 256  # rows tokenised together


@attrs.define(kw_only=True)
class Made:
    """What became of some rows: examples, or documents that are yet to be cut into blocks."""

    examples: TokenDataset
    rows: int
    drops: Counter[str] = attrs.field(factory=Counter)
    changes: Counter[str] = attrs.field(factory=Counter)


@attrs.define(kw_only=True)
class Maker:
    """Turns forms into examples with one tokenizer and template."""

    data: Data
    encoder: Encoder
    template: ChatTemplate | None

    @classmethod
    def of(cls, data: Data, tokenizer: Any) -> Maker:
        return cls(data=data, encoder=Encoder.of(tokenizer), template=load_template(tokenizer, data.chat_template))

    def make(self, forms: Sequence[Form]) -> Made:
        """The examples of the forms, which depend on each form alone; an error names the row's place."""
        made = Made(examples=TokenDataset.of(()), rows=len(forms))
        rendered = [self._rendered(form, made) for form in forms]
        encoded = iter(self.encoder.encode([text for texts in rendered if isinstance(texts, list) for text in texts]))
        kept: list[TokenExample] = []
        for form, texts in zip(forms, rendered, strict=True):
            if texts is None:
                continue
            examples = [texts] if isinstance(texts, TokenExample) else [next(encoded) for _ in texts]
            self._note(texts, made)
            for example in examples:
                kept += self._fitted(example, form, made)
        made.examples = TokenDataset.of(kept)
        return made

    def _note(self, texts: list[Rendered] | TokenExample, made: Made) -> None:
        """Count the row once for whatever happened to it."""
        if isinstance(texts, list):
            made.changes.update({remark for text in texts for remark in text.remarks})
            made.changes.update(["parted"] * (len(texts) > 1))

    def _rendered(self, form: Form, made: Made) -> list[Rendered] | TokenExample | None:
        """The form's texts, its tokens, or None for a row that has nothing to supervise."""
        everything = self.data.train_on == "all"
        if not form.answers and not (everything and isinstance(form, (Conversation, Completion, Instruction))):
            self._unsupervised(form.where, made)
            return None
        if isinstance(form, Tokens):
            ids, labels = (np.asarray(values, np.int32) for values in (form.input_ids, form.labels))
            return TokenExample(input_ids=ids, labels=ids.copy() if everything else labels, where=form.where)
        if isinstance(form, Document):
            return [self.encoder.document(form)]
        if isinstance(form, Instruction):
            form = alpaca_conversation(form) if self.template else alpaca_completion(form)
        if isinstance(form, Completion):
            return [self.encoder.completion(form, everything)]
        if self.template is None:
            raise LuthierError("template-missing", "the rows are conversations, but the tokenizer has no chat template",
                               where=form.where)  # fmt: skip
        return render_conversation(form, self.template, everything)

    def _unsupervised(self, where: str, made: Made) -> None:
        if self.data.unsupervised == "error":
            raise LuthierError("data-unsupervised", "the row has no supervised token", where=where,
                               remedy="Correct the row, or set data.unsupervised: drop.")  # fmt: skip
        made.drops["unsupervised"] += 1

    def _fitted(self, example: TokenExample, form: Form, made: Made) -> list[TokenExample]:
        if self.data.block_size is not None:
            return [example]
        policy = overlong_policy(self.data.overlong, form, form.where)
        kept = []
        for part, event in fit(example, self.data.max_length, policy):
            if part is None and event == "unsupervised":
                self._unsupervised(form.where, made)
            elif part is None:
                made.drops[event] += 1
            else:
                kept.append(part)
                if event:
                    made.changes[event] += 1
        return kept
