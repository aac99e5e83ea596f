"""Tokens of texts under unlike tokenizers: BOS, EOS, borders between prompt and answer, all proven by decoding."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.batches.batch import collate_examples
from luthier.data.examples import IGNORED
from luthier.data.tokenise.encode import Encoder
from luthier.testing import expect_error

QUIET = settings(max_examples=20, deadline=None)
WORDS = st.text(alphabet="ab \n.:é漢🎻", max_size=12)
CORPUS = ["ab ba: aab.\n\nab", "Q: ab\n\nA: ba.", "abab: ba ba.\n\n", " ab ab"] * 4


@functools.cache
def tokenizer_of(kind):
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "bytes":  # written in Python: it has no offsets, and puts EOS after a text
        return transformers.ByT5Tokenizer()
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "merging":  # merges across any border, as a byte-level BPE without pre-tokenizer does
        core.pre_tokenizer, core.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            decoders.ByteLevel(),
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "gpt2":  # one token for BOS and EOS, never put in front
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "spaces":  # as SentencePiece: a space in front of each text, dropped again by decoding
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = list("ab.:é漢🎻\n▁")
    else:  # loses capitals and unknown characters
        core.normalizer = normalizers.Lowercase()
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = list("abé.:ĠĊ")
    specials = ["<unk>", "<s>", "</s>"]
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=specials)
    )
    if kind != "gpt2":
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bos = "</s>" if kind == "gpt2" else "<s>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token="</s>", unk_token="<unk>"
    )


KINDS = ("merging", "gpt2", "spaces", "lossy", "bytes")


@pytest.mark.parametrize("kind", KINDS)
@QUIET
@given(prompt=WORDS, completion=WORDS.filter(bool))
def test_the_completion_and_one_eos_are_supervised(kind, prompt, completion, made, answers):
    tokenizer = tokenizer_of(kind)
    example = made([{"prompt": prompt, "completion": completion}], tokenizer).train[0]
    ids, on = example.input_ids, example.labels != IGNORED
    plain = functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if kind == "lossy":
        completion = plain(tokenizer(completion, add_special_tokens=False)["input_ids"])
    assert "".join(answers(example, tokenizer)).strip(" ") == (completion + "</s>").strip(" ")
    assert ids[-1] == tokenizer.eos_token_id and on[-1] and (ids[on] == tokenizer.eos_token_id).sum() == 1


@pytest.mark.parametrize("kind", ["merging", "gpt2", "lossy", "bytes"])
@QUIET
@given(prompt=WORDS.filter(bool), completion=WORDS.filter(bool))
def test_the_tokens_before_the_completion_are_those_of_the_prompt_alone(kind, prompt, completion, made):
    tokenizer = tokenizer_of(kind)
    example = made([{"prompt": prompt, "completion": completion}], tokenizer).train[0]
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    begins = [tokenizer.bos_token_id] * (kind in ("merging", "lossy"))
    first = int(np.flatnonzero(example.labels != IGNORED)[0])
    assert example.input_ids[:first].tolist() == begins + alone


def test_a_token_across_the_border_would_have_been_made_by_tokenising_at_once():
    tokenizer = tokenizer_of("merging")
    at_once = tokenizer("Q: ab\n\nA: ba.", add_special_tokens=False).tokens()
    assert any("Ċ" in token and "A" in token for token in at_once)  # else the test above proves nothing


@pytest.mark.parametrize("kind", KINDS)
@QUIET
@given(text=WORDS.filter(str.strip))
def test_a_document_is_bos_text_and_eos_all_supervised(kind, text, made):
    tokenizer = tokenizer_of(kind)
    example = made([{"text": text}], tokenizer).train[0]
    begins = [tokenizer.bos_token_id] * (kind in ("merging", "spaces", "lossy"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert example.input_ids.tolist() == [*begins, *ids, tokenizer.eos_token_id]
    np.testing.assert_array_equal(example.labels[1:], example.input_ids[1:])


@pytest.mark.parametrize("text", ["ab", "<s>ab", "<s><s>ab</s>", "ab</s></s>\n", "<s>ab</s>"])
def test_bos_and_eos_that_a_text_already_has_are_not_doubled(text, made):
    tokenizer = tokenizer_of("merging")
    ids = made([{"text": text}], tokenizer).train[0].input_ids.tolist()
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "ab", "</s>"]
    ids = made([{"prompt": "", "completion": text.replace("<s>", "")}], tokenizer).train[0].input_ids.tolist()
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "ab", "</s>"]


@pytest.mark.parametrize("template", ["chatml", "llama3", "bare", "literal_bos", "qwen", "thinking"])
def test_a_prompt_for_generation_has_the_tokens_that_training_saw(template, made, chat):
    tokenizer = chat(template)
    messages = [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": "Ho"}]
    example = made([{"messages": messages}], tokenizer).train[0]
    text = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    first = int(np.flatnonzero(example.labels != IGNORED)[0])
    assert Encoder.of(tokenizer).prompt(text) == example.input_ids[:first].tolist()


def test_labels_are_unshifted_and_only_the_batch_shifts(made, chat):
    rows = [{"prompt": "a", "completion": "b"}, {"text": "c"}]
    train = made([rows[0]], chat("chatml")).train
    batch = collate_examples([train[0], made([rows[1]], chat("chatml")).train[0]])
    ids = batch.input_ids.tolist()
    taught = [(ids[batch.previous[t]], ids[t], batch.labels[t].item()) for t in batch.supervised]
    a, b, c = chat("chatml")("abc", add_special_tokens=False)["input_ids"]
    assert taught == [(a, b, b), (b, 2, 2), (1, c, c), (c, 2, 2)]  # never across the border of two documents


def test_a_completion_needs_an_eos_token_and_a_document_does_not(made, chat):
    tokenizer = chat.__wrapped__(None)
    tokenizer.eos_token = None
    assert len(made([{"text": "ab"}], tokenizer).train[0].input_ids) == 3
    with expect_error("template-unprovable", "data[0]", "eos_token") as caught:
        made([{"prompt": "a", "completion": "b"}], tokenizer)
    assert caught.value.code == "template-unprovable" and caught.value.where == "data[0]"


def test_half_a_surrogate_pair_in_python_rows_is_an_error_with_its_place(made, chat):
    with pytest.raises(LuthierError, match="surrogate") as caught:
        made([{"text": "a"}, {"text": "b\ud83d"}], chat("chatml"))
    assert caught.value.code == "data-row" and caught.value.where == "data[1]"
