"""Tokenizers in GGUF files: how text is split, what is added to it, what ends an answer, and the chat."""

import gguf
import pytest
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model, tiny_tokenizer
from luthier_gguf import Gguf
from luthier_gguf.comparison import NUMERALS, TEXTS
from luthier_gguf.exporter import FILE, GgufExporter
from luthier_gguf.modelfile import find_pieces
from luthier_gguf.vocabulary import SPLITS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["Hello world, hello words: 1234 and 12345.", "it's what isn't there; naïve words, ten 10 tens"] * 20
IMSTART = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + IMSTART
UNDIVIDED = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}"


def split_of(name):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in ("gpt-2", "smollm"))
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    pattern = next(text for text, found in SPLITS.items() if found == name)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def trained(split, template=IMSTART, begins=False):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = split, decoders.ByteLevel()
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_tokens(["<think>"])
    if begins:
        core.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|end|>", eos_token="<|im_end|>")
    made.chat_template = template
    return made


def written(folder, tokenizer, options=None, **changes):
    model = tiny_model(vocab_size=420, **changes).eval()
    exporter = GgufExporter(options or Gguf())
    exporter.export(model, tokenizer, folder)
    exporter.verify(model, tokenizer, folder)
    return {name: field.contents() for name, field in gguf.GGUFReader(folder / FILE).fields.items()}


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_each_way_to_split_text_is_recognised_and_read_alike(tmp_path, name):
    fields = written(tmp_path, trained(split_of(name)))
    assert fields["tokenizer.ggml.pre"] == name
    assert fields["tokenizer.chat_template"] == IMSTART


def test_tokens_have_their_types_and_ids_without_one_are_unused(tmp_path):
    tokenizer = trained(split_of("qwen2"))
    fields = written(tmp_path, tokenizer)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert types[tokens.index("<|im_end|>")] == 3 and types[tokens.index("<think>")] == 4
    assert (len(tokens), types[len(tokenizer)], tokens[len(tokenizer)]) == (420, 5, f"[PAD{len(tokenizer)}]")
    merges = fields["tokenizer.ggml.merges"]
    assert len(merges) > 20 and types[tokens.index(merges[0].replace(" ", ""))] == 1


@pytest.mark.parametrize("begins", [False, True])
def test_what_is_put_in_front_of_a_text_is_said_and_left_out_of_the_modelfile(tmp_path, begins):
    fields = written(tmp_path, trained(split_of("gpt-2"), "{{ bos_token }}" + IMSTART, begins))
    assert fields["tokenizer.ggml.add_bos_token"] is begins
    assert ("<|end|>" in (tmp_path / "Modelfile").read_text()) is not begins


def test_every_token_that_ends_an_answer_is_named(tmp_path):
    tokenizer = trained(split_of("gpt-2"))
    model = tiny_model(vocab_size=420).eval()
    model.generation_config.eos_token_id = [0, tokenizer.eos_token_id]
    GgufExporter(Gguf()).export(model, tokenizer, tmp_path)
    fields = gguf.GGUFReader(tmp_path / FILE).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 0
    text = (tmp_path / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"' in text and 'PARAMETER stop "<|end|>"' in text


def test_the_modelfile_has_the_chat_in_ollamas_language(tmp_path):
    written(tmp_path, trained(split_of("gpt-2")))
    text = (tmp_path / "Modelfile").read_text()
    user = '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ else'
    assert text.startswith("FROM ./model.gguf\nTEMPLATE ") and user in text
    assert text.count("{{ end }}") == 2 and '<|im_start|>assistant\n"""' in text


def test_a_system_message_that_the_template_adds_is_there_without_one_only(tmp_path):
    pieces = find_pieces(trained(split_of("gpt-2"), DEFAULT_SYSTEM))
    assert "Be kind." in pieces.opening and "Be kind." not in pieces.render(("system", "user"))
    written(tmp_path, trained(split_of("gpt-2"), DEFAULT_SYSTEM))
    assert (
        '{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\nBe kind.'
        in (tmp_path / "Modelfile").read_text()
    )


def test_a_chat_that_is_no_row_of_messages_is_left_out_and_said(tmp_path):
    assert find_pieces(trained(split_of("gpt-2"), UNDIVIDED)) is None
    written(tmp_path, trained(split_of("gpt-2"), UNDIVIDED))
    text = (tmp_path / "Modelfile").read_text()
    assert "TEMPLATE" not in text and "cannot express it" in text


def test_the_modelfile_may_be_left_out(tmp_path):
    written(tmp_path, tiny_tokenizer(), Gguf(modelfile=False))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_an_unknown_way_to_split_text_is_refused_unless_it_is_named(tmp_path):
    odd = trained(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), split_of("gpt-2")]))
    with expect_error("part-unsupported", "tokenizer") as caught:
        written(tmp_path, odd)
    assert caught.value.code == "part-unsupported" and "pre_tokenizer" in caught.value.remedy
    GgufExporter(Gguf(pre_tokenizer="gpt-2")).export(tiny_model(vocab_size=420), odd, tmp_path)
    assert gguf.GGUFReader(tmp_path / FILE).fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def test_other_kinds_of_tokenizers_are_refused(tmp_path):
    core = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], 0))
    with expect_error("part-unsupported", "tokenizer") as caught:
        written(tmp_path, PreTrainedTokenizerFast(tokenizer_object=core))
    assert (caught.value.code, caught.value.found) == ("part-unsupported", "Unigram")


def test_more_tokens_than_the_model_has_are_refused(tmp_path):
    with expect_error("model-vocabulary", "tokenizer", "100") as caught:
        GgufExporter(Gguf()).export(tiny_model(vocab_size=100), tiny_tokenizer(), tmp_path)
    assert caught.value.code == "model-vocabulary" and not list(tmp_path.iterdir())


def test_another_tokenizer_than_the_files_is_found(tmp_path):
    tokenizer = trained(split_of("gpt-2"))
    written(tmp_path, tokenizer)
    tokenizer.chat_template = UNDIVIDED
    with expect_error("artifact-mismatch", "model.gguf") as caught:
        GgufExporter(Gguf()).verify(tiny_model(vocab_size=420).eval(), tokenizer, tmp_path)
    assert caught.value.code == "artifact-mismatch"


def in_llama_cpp(folder):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip compiles it")
    return llama_cpp.Llama(str(folder / FILE), n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_llama_cpp_splits_texts_as_the_tokenizer_does(tmp_path, name, begins):
    tokenizer = trained(split_of(name), begins=begins)
    written(tmp_path, tokenizer)
    reader = in_llama_cpp(tmp_path)
    for text in (*TEXTS, *NUMERALS, *CORPUS[:2], "<think>a\r\n  b</think>", "I'LL  I'd 1,000.5\u00a0€ ...!?\n\n\n x "):
        assert reader.tokenize(text.encode(), add_bos=True, special=False) == tokenizer(text)["input_ids"]
        assert reader.detokenize(tokenizer(text, add_special_tokens=False)["input_ids"]).decode() == text
    reader.close()


@pytest.mark.slow
def test_llama_cpp_has_the_chat_and_stops_where_the_model_does(tmp_path):
    tokenizer, model = trained(split_of("qwen2")), tiny_model(vocab_size=420).eval()
    chat = [{"role": "user", "content": "Say 12 words, <think>."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model.generation_config.eos_token_id = None
    answer = model.generate(prompt, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    stop = next(i for i in range(2, 12) if answer[i] not in answer[:i])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, answer[stop]]
    GgufExporter(Gguf()).export(model, tokenizer, tmp_path)
    reader = in_llama_cpp(tmp_path)
    formats = pytest.importorskip("llama_cpp.llama_chat_format")
    template = formats.Jinja2ChatFormatter(reader.metadata["tokenizer.chat_template"], "<|im_end|>", "<|end|>")
    formatted = template(messages=chat).prompt
    assert reader.tokenize(formatted.encode(), add_bos=False, special=True) == prompt[0].tolist()
    said = reader.create_chat_completion(chat, temperature=0, repeat_penalty=1.0, max_tokens=12)
    assert said["choices"][0]["finish_reason"] == "stop"
    assert said["usage"]["completion_tokens"] == stop  # the last token is not counted
    assert said["choices"][0]["message"]["content"] == tokenizer.decode(answer[:stop])
    reader.close()
