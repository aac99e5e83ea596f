"""The texts of a unit: each document of a row, by name, rendered with its supervised spans."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import attrs

from luthier.data.formats.beside import Beside
from luthier.data.formats.conversations import make_conversation
from luthier.data.formats.documents import alpaca_completion, alpaca_conversation, as_messages
from luthier.data.formats.forms import Completion, Conversation, Document, Form, Instruction, Judged, Pair, Side, Texts
from luthier.data.formats.message_roles import named_roles
from luthier.data.read.row import broken_row
from luthier.data.tokenise.chat_template import ChatTemplate
from luthier.data.tokenise.encode import Encoder
from luthier.data.tokenise.supervised_spans import Rendered, render_conversation
from luthier.errors import LuthierError

NamedTexts = dict[str, Rendered]


@attrs.frozen(kw_only=True)
class UnitTexts:
    """A renderer of forms with one template. `train_on` is the recipe's."""

    encoder: Encoder
    template: ChatTemplate | None
    train_on: str | Sequence[str] = "assistant"

    @property
    def everything(self) -> bool:
        """Return True if the whole text is supervised."""
        return self.train_on == "all"

    def texts_of(self, form: Form) -> list[NamedTexts]:
        """Return the documents of each unit that a form becomes: one unit, or one for each answer of a conversation."""
        if isinstance(form, Pair):
            sides = {"chosen": form.chosen, "rejected": form.rejected}
            return [{name: self._side(form, answer) for name, answer in sides.items()}]
        if isinstance(form, Judged):
            return [{"text": self._side(form, form.completion)}]
        if isinstance(form, Texts):
            return [{}]
        return [{"text": text} for text in self._own_texts(form)]

    def _own_texts(self, form: Form) -> list[Rendered]:
        if isinstance(form, Document):
            return [self.encoder.document(form)]
        if isinstance(form, Instruction):
            plain = self.template is None and not (form.tools or form.history)
            form = alpaca_completion(form) if plain else alpaca_conversation(form)
        if isinstance(form, Completion):
            return [self.encoder.completion(form, self.everything)]
        assert isinstance(form, Conversation)
        return self._conversation(form)

    def _conversation(self, form: Conversation) -> list[Rendered]:
        """Return the texts of a conversation, separate for each weight of its answers."""
        template = self._template(form)
        _check_flags(form, self.everything, named_roles(self.train_on) or {"assistant"})
        if self.train_on == "last":
            form = form.last_alone()
        parts = form.by_weight()
        remarks = ("weighted",) * (len(parts) > 1)
        texts = [
            (weight, text) for weight, one in parts for text in render_conversation(one, template, self.everything)
        ]
        if not remarks and parts[0][0] == 1.0:
            return [text for _, text in texts]
        return [attrs.evolve(text, weight=weight, remarks=text.remarks + remarks) for weight, text in texts]

    def _side(self, form: Pair | Judged, answer: Side) -> Rendered:
        """Return the prompt and one answer as one text, in which the answer is supervised.

        Texts go through the chat template as a question and its answer if there is a template and the row has a prompt;
        otherwise they are joined unchanged. Of an answer of several messages only the last is supervised if the
        template rewrites the earlier ones.
        """
        if isinstance(answer, str) and isinstance(form.prompt, str) and not self._is_chat(form):
            return self.encoder.completion(
                Completion(prompt=form.prompt, completion=answer, where=form.where), self.everything
            )
        before = as_messages(form.prompt, "prompt", "user") if form.prompt else []
        messages = [*before, *as_messages(answer, "answer", "assistant")]
        talk = attrs.evolve(
            make_conversation(messages, Beside(tools=form.tools), context=len(before)),
            where=form.where,
            may_be_empty=True,
        )
        talk = talk.last_alone() if self.train_on == "last" else talk
        texts = render_conversation(talk, self._template(form), self.everything)
        if len(texts) > 1:
            return attrs.evolve(texts[-1], remarks=(*texts[-1].remarks, "last_answer"))
        return texts[-1]

    def _is_chat(self, form: Pair | Judged) -> bool:
        """Return True if texts become messages: there is a template, and the row has a prompt of its own."""
        return self.template is not None and bool(form.prompt) and getattr(form, "has_prompt", True)

    def _template(self, form: Form) -> ChatTemplate:
        if self.template is not None:
            return self.template.with_settings(form.settings)
        problem = "the rows are conversations, but the tokenizer has no chat template"
        raise LuthierError("template-missing", problem, where=form.where)


def _check_flags(form: Conversation, everything: bool, roles: Collection[str]) -> None:
    """Raise `data-row` if a message's flag asks for something that the recipe's `train_on` cannot do."""
    for i, (message, flag) in enumerate(zip(form.messages, form.flags, strict=False)):
        where = f"{form.where}: message {i + 1}"
        if everything and flag not in (None, 1.0):
            raise broken_row("train_on: all supervises every token, but the message's flag says otherwise", flag, where)
        if not everything and flag and message["role"] not in roles:
            whose = " and ".join(f"the {role}'s" for role in sorted(roles))
            problem = f"a message of the {message['role']} is flagged to be supervised, but only {whose} can be"
            raise broken_row(problem, flag, where)
