"""Preparing: a recipe's rows, read, recognised, split, rendered and tokenised, everything counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs
import numpy as np

from luthier.data.documents import alpaca_completion, alpaca_conversation
from luthier.data.examples import PreferenceExample, TokenDataset, TokenExample
from luthier.data.forms import Completion, Conversation, Document, Form, Instruction, Tokens
from luthier.data.overlong import fit, overlong_policy
from luthier.data.read import read_given, read_source
from luthier.data.recognise import convert_row, recognise
from luthier.data.report import Report, formats_of
from luthier.data.rows import Row
from luthier.data.spans import Rendered, render_conversation
from luthier.data.template import ChatTemplate, load_template
from luthier.data.tokenise import Encoder
from luthier.errors import LuthierError
from luthier.recipe.tree import Data, Source

BATCH: Final = 256  # rows tokenised together
Progress = Callable[[int, int], None]  # rows done, rows in all
Examples = TokenDataset | tuple[PreferenceExample, ...]


@attrs.frozen(kw_only=True)
class Prepared:
    """Examples ready for packing (TokenDatasets), or pairs of kind "preference"."""

    train: Any  # TokenDataset, or a tuple of PreferenceExample
    validation: Any | None
    report: Report
    chat_template: str | None = None  # the text that was used, to be saved with the model
    chat_template_hash: str | None = None
    stop_tokens: tuple[int, ...] = ()  # ids that supervised spans end with, for the generation config


def prepare(
    data: Data,
    tokenizer: Any,
    *,
    seed: int,
    kind: str = "tokens",
    given: Any = None,
    given_validation: Any = None,
    progress: Progress | None = None,
) -> Prepared:
    """The training and validation examples of `data`, deterministic in `seed`.

    `given` and `given_validation` are rows in Python or `datasets` objects in the place of `data.train` and
    `data.validation`. Raises the data and template errors of `luthier.errors`, with file and line, before any training.
    """
    train, names = read_forms(data, data.train, given, "data", kind)
    validation, _ = _validation(data, given_validation, kind)
    if validation is None and data.validation:
        train, validation = _divided(train, _share(data), seed)
    maker = Maker.of(data, tokenizer, progress, len(train) + len(validation or ()))
    made = maker.make(train, formats_of(names), kind)
    held = None if validation is None else maker.make(validation, formats_of(names), kind)
    report = attrs.evolve(made[1], validation=held and held[1])
    return maker.prepared(made[0], held and held[0], report)


def read_forms(data: Data, sources: Sequence[Source], given: Any, name: str, kind: str) -> tuple[list[Any], list[str]]:
    """Every row of the sources as its format's form, and each source's format."""
    forms: list[Any] = []
    names = []
    for rows, source in _read(data, sources, given, name):
        mapped = {*source.columns, *source.template}
        form = recognise(rows, source.path, mapped) if data.format == "auto" else data.format
        _check_kind(form, kind, source.path)
        forms += [convert_row(row, form) for row in rows]
        names.append(form)
    return forms, names


def _read(data: Data, sources: Sequence[Source], given: Any, name: str) -> list[tuple[list[Row], Source]]:
    if given is not None:
        source = sources[0] if len(sources) == 1 else Source(path=name)
        source = attrs.evolve(source, path=name)
        rows = list(read_given(given, name, source))
        found = [(rows, source)]
    else:
        found = [(list(read_source(source, data.text_unit)), source) for source in sources]
    for rows, source in found:
        if not rows:
            raise LuthierError("data-empty", "there are no rows", where=source.path)
    if not found:
        raise LuthierError("data-empty", "no source of rows is given", where="data.train")
    return found


def _check_kind(form: str, kind: str, where: str) -> None:
    if (form == "preference") == (kind == "preference"):
        return
    if form == "preference":
        problem, remedy = "these are preference pairs, but the loss takes tokens", "Choose a loss for pairs."
    else:
        problem = f"these are {form} rows, but the loss takes preference pairs"
        remedy = "Give rows with chosen and rejected, or choose another loss."
    raise LuthierError("data-format", problem, where=where, remedy=remedy)


def _validation(data: Data, given: Any, kind: str) -> tuple[list[Any] | None, list[str]]:
    sources = data.validation if isinstance(data.validation, list) else []
    if given is None and not sources:
        return None, []
    return read_forms(data, sources, given, "eval_data", kind)


def _share(data: Data) -> float:
    share = data.validation
    if isinstance(share, list) or 0 <= share <= 0.5:
        return 0.0 if isinstance(share, list) else share
    raise LuthierError("recipe-out-of-range", "a share is from 0 to 0.5", where="data.validation", found=share)


def _divided(forms: list[Any], share: float, seed: int) -> tuple[list[Any], list[Any] | None]:
    """Rows for training and for validation, at least one of each, both in their order."""
    if not share:
        return forms, None
    if len(forms) < 2:
        problem = "one row cannot be divided into training and validation"
        raise LuthierError("data-empty", problem, where="data.validation", remedy="Give validation its own file.")
    count = min(max(1, round(share * len(forms))), len(forms) - 1)
    held = set(np.random.default_rng(seed).permutation(len(forms))[:count].tolist())
    return [f for i, f in enumerate(forms) if i not in held], [f for i, f in enumerate(forms) if i in held]


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
        made = self._pairs(forms, report) if kind == "preference" else self._tokens(forms, report)
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
            if len(examples) > 1:
                report.changes["parted"] += 1
            for example in examples:
                kept += self._fitted(example, form, report)
        return kept

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

    def prepared(self, train: Examples, validation: Examples | None, report: Report) -> Prepared:
        template = self.template
        return Prepared(
            train=train,
            validation=validation,
            report=report,
            chat_template=template and template.text,
            chat_template_hash=template and template.hash,
        )
