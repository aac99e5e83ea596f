"""Making: forms of rows into token examples or pairs, with one tokenizer and template, everything counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs
import numpy as np

from luthier.data.documents import alpaca_completion, alpaca_conversation
from luthier.data.examples import PreferenceExample, TokenDataset, TokenExample
from luthier.data.forms import Completion, Conversation, Document, Form, Instruction, Tokens
from luthier.data.overlong import fit, overlong_policy
from luthier.data.remarks import warnings_of
from luthier.data.report import Report
from luthier.data.spans import Rendered, render_conversation
from luthier.data.template import ChatTemplate, load_template
from luthier.data.tokenise import Encoder
from luthier.errors import LuthierError
from luthier.recipe.tree import Data

BATCH: Final = 256  # rows tokenised together
Progress = Callable[[int, int], None]  # rows done, rows in all
Examples = TokenDataset | tuple[PreferenceExample, ...]


@attrs.define(kw_only=True)
class Maker:
    """Turns forms into examples with one tokenizer and template."""

    data: Data
    encoder: Encoder
    template: ChatTemplate | None
    progress: Progress | None
    total: int
    done: int = 0

    @classmethod
    def of(cls, data: Data, tokenizer: Any, progress: Progress | None, total: int) -> Maker:
        template = load_template(tokenizer, data.chat_template)
        return cls(data=data, encoder=Encoder.of(tokenizer), template=template, progress=progress, total=total)

    def make(self, forms: Sequence[Any], name: str, kind: str) -> tuple[Examples, Report]:
        """The examples of the forms, and the report of what became of them; `data-empty` when none is left."""
        report = Report(format=name, rows=len(forms))
        pairs = kind == "preference" or (kind == "any" and isinstance(forms[0], PreferenceExample))
        made = self._pairs(forms, report) if pairs else self._tokens(forms, report)
        report.warnings = warnings_of(report, forms, self.template)
        if len(made) == 0:
            dropped = ", ".join(f"{reason}: {count}" for reason, count in report.drops.items())
            raise LuthierError("data-empty", f"no row is left to train on; dropped: {dropped}", where="data")
        return made, report

    def _tokens(self, forms: Sequence[Form], report: Report) -> TokenDataset:
        kept: list[TokenExample] = []
        for start in range(0, len(forms), BATCH):
            batch = forms[start : start + BATCH]
            kept += self._batch(batch, report)
            self._tell(len(batch))
        dataset = TokenDataset.of(kept)
        report.measure(dataset.lengths, dataset.num_supervised)
        return dataset

    def _tell(self, rows: int) -> None:
        self.done += rows
        if self.progress is not None:
            self.progress(self.done, self.total)

    def _batch(self, forms: Sequence[Form], report: Report) -> list[TokenExample]:
        rendered = [self._rendered(form, report) for form in forms]
        encoded = iter(self.encoder.encode([text for texts in rendered if isinstance(texts, list) for text in texts]))
        kept = []
        for form, texts in zip(forms, rendered, strict=True):
            if texts is None:
                continue
            examples = [texts] if isinstance(texts, TokenExample) else [next(encoded) for _ in texts]
            self._note(texts, report)
            for example in examples:
                kept += self._fitted(example, form, report)
        return kept

    def _note(self, texts: list[Rendered] | TokenExample, report: Report) -> None:
        """Count the row once for whatever happened to it."""
        if isinstance(texts, list):
            report.changes.update({remark for text in texts for remark in text.remarks})
            report.changes.update(["parted"] * (len(texts) > 1))

    def _rendered(self, form: Form, report: Report) -> list[Rendered] | TokenExample | None:
        """The form's texts, its tokens, or None for a row that has nothing to supervise."""
        everything = self.data.train_on == "all"
        if not form.answers and not (everything and isinstance(form, (Conversation, Completion, Instruction))):
            self._unsupervised(form.where, report)
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

    def _unsupervised(self, where: str, report: Report) -> None:
        if self.data.unsupervised == "error":
            raise LuthierError("data-unsupervised", "the row has no supervised token", where=where,
                               remedy="Correct the row, or set data.unsupervised: drop.")  # fmt: skip
        report.drops["unsupervised"] += 1

    def _fitted(self, example: TokenExample, form: Form, report: Report) -> list[TokenExample]:
        policy = overlong_policy(self.data.overlong, form, form.where)
        kept = []
        for part, event in fit(example, self.data.max_length, policy):
            if part is None and event == "unsupervised":
                self._unsupervised(form.where, report)
            elif part is None:
                report.drops[event] += 1
            else:
                kept.append(part)
                if event:
                    report.changes[event] += 1
        return kept

    def _pairs(self, forms: Sequence[PreferenceExample], report: Report) -> tuple[PreferenceExample, ...]:
        kept = tuple(pair for pair in forms if pair.chosen != pair.rejected)
        report.examples = len(kept)
        if len(kept) < len(forms):
            report.drops["equal_pair"] = len(forms) - len(kept)
        self._tell(len(forms))
        return kept
