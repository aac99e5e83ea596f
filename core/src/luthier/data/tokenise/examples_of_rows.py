"""The making of examples: forms of rows become token examples, with one tokenizer and template, everything counted."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import attrs
import numpy as np

from luthier.data.examples import TokenDataset, TokenExample, are_equal
from luthier.data.formats.bad_rows import Fault
from luthier.data.formats.beside import template_variables
from luthier.data.formats.forms import Completion, Conversation, Document, Form, Instruction, Pair, Tokens
from luthier.data.formats.message_roles import named_roles, supervise_roles
from luthier.data.formats.read_rows import ReadRows
from luthier.data.read.packed_rows import BLOCK
from luthier.data.tokenise.chat_template import ChatTemplate, load_template
from luthier.data.tokenise.encode import Encoder, check_text
from luthier.data.tokenise.flat.labelled_texts import Whole
from luthier.data.tokenise.overlong import check_messages, fit_length, fit_unit, is_overlong, overlong_policy
from luthier.data.tokenise.refusals.lost_parts import lost_error, lost_kind, lost_parts
from luthier.data.tokenise.refusals.tried_remedies import advise_change
from luthier.data.tokenise.supervised_spans import Rendered, fill_conversation
from luthier.data.tokenise.unit_texts import UnitTexts
from luthier.errors import LuthierError
from luthier.recipe.schema import Data, Overlong

CHUNK: Final = BLOCK  # rows that are tokenised together
# the word under which a dropped row is counted, if not "overlong"
OVERLONG: Final[dict[type, str]] = {Pair: "overlong_pair"}


@attrs.frozen(kw_only=True)
class Draft:
    """The documents of one unit, by name: texts to tokenise, after those that are tokens already."""

    texts: Mapping[str, Rendered]
    tokens: Mapping[str, TokenExample] = attrs.field(factory=dict)

    @property
    def is_bare(self) -> bool:
        """Return True if the unit is one text of which there is nothing to note."""
        if self.tokens or len(self.texts) > 1 or "text" not in self.texts:
            return False
        text = self.texts["text"]
        return not (text.remarks or text.lost)


@attrs.define(kw_only=True)
class Made:
    """The result of making some rows: examples, or documents that are yet to be cut into blocks."""

    examples: TokenDataset
    rows: int
    drops: Counter[str] = attrs.field(factory=Counter)
    changes: Counter[str] = attrs.field(factory=Counter)
    unrendered: Counter[str] = attrs.field(factory=Counter)  # parts that the chat template leaves out, by role
    faults: list[Fault] = attrs.field(factory=list)  # of rows from which nothing could be made
    read: ReadRows | None = None  # what was read of the rows, without their forms, if that was done by the same process


def _settings_of(data: Data) -> dict[str, Any]:
    where, remedy = "data.chat_template_kwargs", "Leave them out."
    try:
        return template_variables(data.chat_template_kwargs, where)
    except LuthierError as error:
        raise LuthierError("recipe-conflict", error.problem, where=where, found=error.found, remedy=remedy) from None


@attrs.define(kw_only=True)
class Maker:
    """A maker of examples from forms, with one tokenizer and template."""

    data: Data
    encoder: Encoder
    template: ChatTemplate | None

    @classmethod
    def of(cls, data: Data, tokenizer: Any) -> Maker:
        template = load_template(tokenizer, data.chat_template, _settings_of(data))
        return cls(data=data, encoder=Encoder.of(tokenizer), template=template)

    def make(self, forms: Sequence[Form]) -> Made:
        """Return the examples of the forms. Each depends on its form alone, and an error names the row's place.

        An example's index is the number of its form among these.
        """
        forms = list(forms)  # packed ones are unpacked once
        made = Made(examples=TokenDataset.of(()), rows=len(forms))
        drafts = [self._checked(form, number, made) for number, form in enumerate(forms)]
        texts = _texts(itertools.chain.from_iterable(drafts))
        encoded, undecodable = self.encoder.encode(texts)
        made.changes.update(["undecodable"] * len(undecodable))
        is_trainable = encoded.are_trainable(None if self.data.block_size is not None else self.data.max_length)
        fitted: list[Whole | TokenExample] = []
        at = 0  # the number of the next text
        for number, (form, own) in enumerate(zip(forms, drafts, strict=True)):
            if len(own) == 1 and own[0].is_bare and is_trainable[at] and self._keeps_whole(form):
                fitted.append(Whole(text=at, row=number, weight=texts[at].weight * form.weight, where=form.where))
                at += 1
                continue
            self._note(own, made)
            for draft in own:
                rest = {name: encoded.example(at + i, text) for i, (name, text) in enumerate(draft.texts.items())}
                at += len(rest)
                example = TokenExample.joined({**draft.tokens, **rest})
                example = example.of_row(form.where, form.columns, number, form.weight)
                fitted += self._fitted(example, form, number, made)
        made.examples = encoded.joined(fitted)
        return made

    def _keeps_whole(self, form: Form) -> bool:
        """Return True if a text of this form that fits is an example as it is."""
        splits = self.data.overlong == "split" and self.data.block_size is None
        return not form.columns and (not splits or isinstance(form, Document))

    def _checked(self, form: Form, number: int, made: Made) -> list[Draft]:
        """Return the documents of each unit that the form becomes; none for a bad row, whose fault is noted."""
        try:
            filled = self._filled(form)
            drafts = self._drafts(form, made) if filled is None else [filled]
            for draft in drafts:
                for text in draft.texts.values():
                    check_text(text)
        except LuthierError as error:
            self._refuse(self._advised(error, form, made), number, made)
            return []
        return drafts

    def _advised(self, error: LuthierError, form: Form, made: Made) -> LuthierError:
        """Return the error with a remedy that was tried. The first bad row alone is tried, as its remedy is told."""
        if self.template is None or not isinstance(form, Conversation) or made.faults:
            return error
        template = self.template.with_settings(form.settings)
        return advise_change(error, form, template, self.data.train_on == "all")

    def _filled(self, form: Form) -> Draft | None:
        """Return the document of a conversation of a known shape, of which nothing else has to be found out.

        `_drafts` gives the same for every row, and takes three times as long.
        """
        if type(form) is not Conversation or self.data.train_on != "assistant" or self.template is None:
            return None
        if form.texts or form.settings or form.weight == 0:
            return None
        text = fill_conversation(form, self.template)
        return None if text is None else Draft(texts={"text": text})

    def _note(self, drafts: list[Draft], made: Made) -> None:
        """Count the row once for each thing that happened to it."""
        texts = _texts(drafts)
        if len(drafts) == 1 and not any(text.remarks or text.lost for text in texts):
            return
        remarks = {remark for text in texts for remark in text.remarks}
        lost = lost_parts(texts)
        made.unrendered.update(part.role for part in lost)
        made.changes.update(["unrendered"] * bool(lost))
        made.changes.update(sorted(remarks))
        made.changes.update(["parted"] * (len(drafts) > 1 and "weighted" not in remarks))

    def _drafts(self, form: Form, made: Made) -> list[Draft]:
        """Return the documents of each unit that the form becomes; none for a row without anything to supervise."""
        everything, roles = self.data.train_on == "all", named_roles(self.data.train_on)
        further = {
            name: self.encoder.document(Document(text=text, where=form.where)) for name, text in form.texts.items()
        }
        if form.weight == 0:
            raise _unsupervised(form)
        if roles:
            form = supervise_roles(form, roles, has_template=self.template is not None)
        if isinstance(form, Tokens) and self.data.train_on == "last":
            form = form.last_alone()
        if isinstance(form, Tokens) and (form.answers or everything):
            ids, labels = (np.asarray(values, np.int32) for values in (form.input_ids, form.labels))
            tokens = TokenExample(input_ids=ids, labels=ids.copy() if everything else labels, where=form.where)
            return [Draft(tokens={"text": tokens}, texts=further)]
        if isinstance(form, Pair) and form.chosen == form.rejected:
            made.drops["equal_pair"] += 1
            return []
        if isinstance(form, Conversation) and not everything and self._is_overlong(form):
            made.drops["overlong"] += 1
            return []
        if not form.answers and not (everything and isinstance(form, (Conversation, Completion, Instruction))):
            raise _unsupervised(form)
        render = UnitTexts(encoder=self.encoder, template=self.template, train_on=self.data.train_on)
        drafts = [Draft(texts={**own, **further}) for own in render.texts_of(form)]
        if self.data.unrendered == "error" and (lost := lost_parts(_texts(drafts))):
            raise lost_error(lost, form.where)
        return drafts

    def _is_overlong(self, form: Conversation) -> bool:
        """Return True for a very long conversation that is dropped, so that its answers need not be found first."""
        dropped = self.data.block_size is None and overlong_policy(self.data.overlong, form, form.where) == "drop"
        if dropped and self.template is not None and is_overlong(form, self.template, self.encoder, self.data):
            return True
        check_messages(form)
        return False

    def _refuse(self, error: LuthierError, number: int, made: Made) -> None:
        """Note a bad row once, or count it if the recipe says what becomes of its kind."""
        if error.code == "data-unsupervised" and self.data.unsupervised == "drop":
            made.drops["unsupervised"] += 1
        elif not made.faults or made.faults[-1].number != number:
            made.faults.append(Fault.of(error, kind=lost_kind(error), number=number))

    def _fitted(self, example: TokenExample, form: Form, number: int, made: Made) -> list[TokenExample]:
        """Return the parts of an example that are used, and count the others."""
        if self.data.block_size is not None:
            return [example]
        policy, fitted = overlong_policy(self.data.overlong, form, form.where), []
        for part, event in self._parts(example, form, policy):
            if part is None and event == "unsupervised":
                self._refuse(_unsupervised(form), number, made)
            elif part is None:
                made.drops[event] += 1
            else:
                fitted.append(part)
                made.changes.update([event] if event else ())
        return fitted

    def _parts(self, example: TokenExample, form: Form, policy: Overlong) -> Iterable[tuple[TokenExample | None, str]]:
        if not example.names:
            return fit_length(example, self.data.max_length, policy)
        part, event = fit_unit(example, self.data.max_length, policy, OVERLONG.get(type(form), "overlong"))
        if part is not None and isinstance(form, Pair) and are_equal(part, "chosen", "rejected"):
            return [(None, "equal_pair")]
        return [(part, event)]


def _unsupervised(form: Form) -> LuthierError:
    remedy = "Correct the row."
    return LuthierError("data-unsupervised", "the row has no supervised token", where=form.where, remedy=remedy)


def _texts(drafts: Iterable[Draft]) -> list[Rendered]:
    return [text for draft in drafts for text in draft.texts.values()]
