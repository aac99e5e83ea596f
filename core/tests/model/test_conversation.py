"""Conversations: what is kept between turns changes no answer, and a stream is the answer's text."""

import attrs
import pytest
import torch
from exact_models import exact_model
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.model.attention import install_attention
from luthier.model.generation.conversation import Conversation
from luthier.model.generation.generate import PromptForm, Sampling, generate_text
from luthier.model.generation.text_stream import TextStream
from luthier.testing import expect_error
from luthier.testing.worlds import TEMPLATE, tiny_model, tiny_tokenizer
from test_prompts import Virtual

SHORT = Sampling(max_new_tokens=6)
TOKENIZER = tiny_tokenizer()


def talk(**changes):
    model = tiny_model().eval()
    return Conversation(model=model, tokenizer=tiny_tokenizer(), **changes)


def forgetful(conversation):
    """The same talk before its last answer, with nothing computed yet."""
    return attrs.evolve(conversation, messages=conversation.messages[:-2])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_an_answer_with_what_was_kept_is_that_of_a_conversation_computed_anew(name):
    model = exact_model(name) if name == "gemma3" else tiny_model(name).double()
    install_attention(model.eval())
    conversation = Conversation(model=model, tokenizer=TOKENIZER)
    for message in ("1 and 2 and 3 and 4 and 5 and 6?", "And 7?"):
        conversation.ask(message, Sampling(max_new_tokens=1))
    reply = conversation.ask("Why is that so?", SHORT)
    anew = forgetful(conversation)
    again = anew.ask("Why is that so?", SHORT)
    assert reply.kept_tokens > 0 == again.kept_tokens
    assert attrs.evolve(reply, kept_tokens=0) == again
    assert conversation._cached == anew._cached  # every token of both


def test_what_was_computed_is_kept_where_the_next_prompt_begins_with_it():
    conversation = talk()
    first = conversation.ask("1?", Sampling(max_new_tokens=1))
    second = conversation.ask("2?", Sampling(max_new_tokens=1))
    assert second.kept_tokens == first.prompt_tokens  # the one token of the answer was never put in
    conversation.set_system("short")
    assert conversation.ask("3?", SHORT).kept_tokens == 0


def test_an_adapter_with_virtual_tokens_answers_each_turn_anew():
    model = tiny_model().eval()
    install_attention(model)
    adapter = Virtual(model)
    conversation = Conversation(model=model, tokenizer=tiny_tokenizer(), adapter=adapter)
    replies = [conversation.ask(text, SHORT) for text in ("1?", "2?")]
    assert [reply.kept_tokens for reply in replies] == [0, 0]
    history = [*conversation.messages[:2], {"role": "user", "content": "2?"}]
    assert generate_text(model, tiny_tokenizer(), history, adapter=adapter, sampling=SHORT) == replies[1].text


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 250), max_size=30), text=st.text(max_size=12))
def test_the_pieces_of_a_stream_are_the_text_of_its_tokens(ids, text):
    tokenizer, pieces = TOKENIZER, []
    ids += tokenizer(text.encode("utf-8", "ignore").decode(), add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        stream.put(torch.tensor([token]))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)[: len("".join(pieces))]
    assert stream.finish_text() == "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_piece_is_told_as_soon_as_it_is_a_character():
    tokenizer, told = tiny_tokenizer(), []
    stream = TextStream(tokenizer, told.append)
    stream.put(torch.tensor([[]]))
    for token in tokenizer("aé", add_special_tokens=False)["input_ids"]:
        stream.put(torch.tensor([token]))
    assert told[0] == "a" and "".join(told) == "aé"


def test_leaving_ends_the_answer_there_and_the_talk_goes_on():
    conversation, left = talk(), []
    reply = conversation.ask("1?", Sampling(max_new_tokens=50), leave=lambda: left.append(1) or len(left) == 3)
    assert (reply.tokens, reply.ended) == (3, "left")
    assert conversation.messages[-1] == {"role": "assistant", "content": reply.text}
    assert conversation.ask("2?", SHORT).ended in ("length", "stop")


def test_nothing_was_said_where_an_answer_fails():
    def fail(piece):
        raise ZeroDivisionError

    conversation = talk()
    conversation.ask("1?", SHORT)
    before = list(conversation.messages)
    with pytest.raises(ZeroDivisionError):
        conversation.ask("2?", SHORT, on_text=fail)
    assert conversation.messages == before
    assert conversation.ask("2?", SHORT).kept_tokens == 0
    assert forgetful(conversation).ask("2?", SHORT).text == conversation.messages[-1]["content"]


def test_the_stop_tokens_of_training_end_an_answer():
    free = talk()
    assert free.ask("1?", Sampling(max_new_tokens=2)).ended == "length"
    first = free._cached[-1]  # token of the answer
    reply = talk(form=PromptForm(stops=(first,))).ask("1?", SHORT)
    assert (reply.tokens, reply.ended) == (1, "stop")


def test_the_templates_variables_reach_the_prompt():
    tokenizer = tiny_tokenizer("{{ flavour | default('') }}" + TEMPLATE)
    model = tiny_model().eval()
    plain = Conversation(model=model, tokenizer=tokenizer).ask("1?", SHORT)
    form = PromptForm(variables={"flavour": "sweet"})
    sweet = Conversation(model=model, tokenizer=tokenizer, form=form).ask("1?", SHORT)
    assert sweet.prompt_tokens > plain.prompt_tokens
    asked = generate_text(model, tokenizer, "1?", form=form, sampling=SHORT)
    assert asked == sweet.text


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_model_of_plain_prompts_continues_each_message_by_itself(template):
    conversation = Conversation(
        model=tiny_model().eval(), tokenizer=tiny_tokenizer(template), form=PromptForm(chat=False)
    )
    first, _, again = (conversation.ask(text, SHORT) for text in ("1?", "2?", "1?"))
    assert (first.text, first.prompt_tokens) == (again.text, again.prompt_tokens)
    with expect_error("template-missing"):
        conversation.set_system("Be brief.")


def test_a_conversation_that_the_model_has_no_room_for_is_refused_and_the_last_answer_fits():
    conversation = talk()
    conversation.model.config.max_position_embeddings = conversation.ask("1?", SHORT).prompt_tokens + 2
    conversation.reset()
    assert conversation.ask("1?", Sampling(max_new_tokens=50)).tokens <= 2
    with expect_error("recipe-out-of-range", "prompt") as caught:
        conversation.ask("2?", SHORT)
    assert caught.value.remedy == "Begin a new conversation."
