"""Rows filled in from a plan of their shape, and tokens proven by their bytes, equal what every row gives by itself."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.formats.beside import Beside
from luthier.data.formats.conversations import make_conversation
from luthier.data.tokenise.chat_template import load_template
from luthier.data.tokenise.encode import Encoder
from luthier.data.tokenise.shapes.symbolic_text import Slot, SymbolicText, Trace, UnknownText, join_texts, pieces_of
from luthier.data.tokenise.supervised_spans import Rendered, render_conversation
from luthier.testing.worlds import tiny_tokenizer

PIECES = [
    "a",
    "b ",
    " ",
    "\n",
    "é",
    "漢",
    "🎻",
    "<|im_end|>",
    "<think>",
    "</think>",
    "</s>",
    "<",
    "it's",
    "12",
    "\u00a0",
]
WORDS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)
QUIET = settings(max_examples=15, deadline=None)
ASKING = "{% for m in messages %}{{ '<s>' + m.role + '\n' }}{% if 'x' in m.content %}!{% endif %}{{ m.content | trim ~ '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"


def conversation(turns, system=""):
    roles = ("user", "assistant")
    messages = [{"role": role, "content": said} for turn in turns for role, said in zip(roles, turn, strict=True)]
    return make_conversation(messages, Beside(system=system))


def rendered(form, template):
    try:
        return render_conversation(form, template)
    except LuthierError as error:
        return error.line


def alone(form, template):
    """What a template gives for a row that is its first one, so that there is no plan yet."""
    return rendered(form, load_template(template.tokenizer, template.given))


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen", "thinking", "mistral", "shouting", "tagged", "mute"])
@QUIET
@given(rows=st.lists(st.tuples(TURNS, st.sampled_from(["", "be kind"])), min_size=2, max_size=5))
def test_a_row_is_rendered_alike_with_and_without_a_plan(name, rows, chat):
    template = load_template(chat(name))
    for turns, system in rows:
        form = conversation(turns, system)
        assert rendered(form, template) == alone(form, template)


@pytest.mark.parametrize("name", ["chatml", "llama3", "thinking"])
def test_a_row_of_a_known_shape_is_filled_in_without_the_template(name, chat):
    template = load_template(chat(name))
    render_conversation(conversation([("hi", "hello")]), template)
    filled = template.plans.fill(conversation([("how are you", "well")]), template)
    (made,) = alone(conversation([("how are you", "well")]), template)
    assert filled == (made.text, made.spans)


@pytest.mark.parametrize("said", ["a <think>b</think> c", "bye<|im_end|>", ""])
def test_a_text_that_is_rewritten_before_the_template_is_not_filled_in(said, chat):
    template = load_template(chat("chatml"))
    render_conversation(conversation([("hi", "hello")]), template)
    assert template.plans.fill(conversation([("hi", said)]), template) is None


def test_a_template_that_asks_about_a_text_gets_a_plan_for_each_answer():
    template = load_template(tiny_tokenizer(ASKING))
    for said in ("a", "x", "b", " x "):
        form = conversation([(said, "yes")])
        assert rendered(form, template) == alone(form, template)
    (plans,) = template.plans.known.values()
    assert len(plans) == 2


@pytest.mark.parametrize("change", ["m.content[:2]", "m.content | length ~ m.content",
                                    "m.content.split('a')[0] ~ m.content", "m.content | tojson", "(m | string) ~ m.content"])  # fmt: skip
def test_a_template_that_looks_further_into_a_text_gets_no_plan(change):
    template = load_template(tiny_tokenizer(ASKING.replace("m.content | trim", change)))
    for said in ("aa", "bb"):
        form = conversation([(said, "b")])
        assert rendered(form, template) == alone(form, template)
    assert template.plans.failed
    assert not any(template.plans.known.values())


def test_todays_date_in_a_plan_is_compared_for_every_row():
    template = load_template(tiny_tokenizer("{{ strftime_now('%d %H') }}" + ASKING))
    render_conversation(conversation([("hi", "hello")]), template)
    ((plan,),) = template.plans.known.values()
    assert plan.fits(["a", "b"])
    assert not attrs.evolve(plan, dates=(("%d %H", "another day"),)).fits(["a", "b"])


def test_an_unknown_text_answers_only_what_holds_for_every_text():
    trace = Trace(["a text"])
    text = SymbolicText(trace, [Slot(0)])
    assert pieces_of(join_texts(["<", "b>", text + "!", 1])) == ("<b>", Slot(0), "!1")
    assert "text" in text and text.strip().startswith("a") and text != "b" and text
    assert len(trace.answers) == 4
    for look in (len, str, repr, hash, list, lambda t: t == t.strip(), lambda t: t.upper(), lambda t: "!" in t + "!"):
        with pytest.raises((UnknownText, TypeError)):
            look(text)


@settings(max_examples=60, deadline=None)
@given(said=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_tokens_proven_by_bytes_are_those_found_by_offsets(said, demo_encoders):
    by_bytes, by_offsets = demo_encoders
    texts = []
    for prompt, answer in said:
        begin = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        texts.append(Rendered(text=f"{begin}{answer}<|im_end|>\n", spans=((len(begin), len(begin + answer) + 10),)))
    one, other = by_bytes.encode(texts), by_offsets.encode(texts)
    assert one[1] == other[1]
    for name in ("input_ids", "labels", "starts"):
        assert getattr(one[0], name).tolist() == getattr(other[0], name).tolist()


@pytest.fixture(scope="module")
def demo_encoders():
    """An encoder that proves by bytes, and the same one without them."""
    from luthier.model.load import tokenizer_of
    from luthier.recipe.schema import Model

    encoder = Encoder.of(tokenizer_of(Model(name_or_path="demo")))
    assert encoder.octets is not None
    return encoder, attrs.evolve(encoder, octets=None, known={})


def test_most_texts_need_no_offsets(demo_encoders):
    encoder, _ = demo_encoders
    text = "<|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\nit's é<|im_end|>\n"
    span = (text.index("it's"), len(text) - 1)
    (found,) = encoder.octets.encode([Rendered(text=text, spans=(span,))], encoder._alone)
    ids, ((first, end),) = found
    assert encoder.tokenizer.decode(ids[first:end]) == text[slice(*span)]


@pytest.mark.parametrize("state", ["padding", "truncation"])
def test_a_tokenizer_that_pads_or_cuts_is_not_called_without_offsets(state):
    tokenizer = tiny_tokenizer()
    encoder, core = Encoder.of(tokenizer), tokenizer.backend_tokenizer
    text = Rendered(text="a", spans=())
    assert encoder.octets.encode([text], encoder._alone) != [None]
    core.enable_padding(length=9) if state == "padding" else core.enable_truncation(1)
    assert encoder.octets.encode([text], encoder._alone) == [None]


def test_a_tokenizer_of_words_has_no_bytes():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    assert Encoder.of(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")).octets is None
