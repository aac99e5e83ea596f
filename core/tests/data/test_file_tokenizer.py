"""Tokenizers read by the tokenizers library alone: the same tokens and texts as transformers gives."""

import json
import subprocess
import sys

import luthier
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.data.formats.wanted import TOKENS
from luthier.data.prepare import prepare_data
from luthier.data.template_calls import render_messages
from luthier.data.tokenise.chat_template import load_template
from luthier.data.tokenise.plain.file_tokenizer import CLASSES, read_tokenizer
from luthier.demo import MODEL
from luthier.recipe.schema import Data, Model, Source
from luthier.testing import expect_error
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CORPUS = ["the cat sat on the mat", "a dog ate the cat's hat", "Über die Brücke, 12 mal!", "def f(x): return x + 1"] * 4
TEMPLATES = ["chatml", "mute", "llama3", "bare", "tagged", "tagged_loose", "thinking", "literal_bos", "qwen", "mistral"]
TEXT = st.text(alphabet="abet hc.\n<>|é漢🎻</s>!'12", max_size=30)
MARKS = ["<s>", "</s>", "<unk>"]
FEW = settings(max_examples=25, deadline=None)


def word_piece():
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    core.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=MARKS))
    return core


def unigram():
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=MARKS, unk_token="<unk>", show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return core


def byte_pairs():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    return core


@pytest.fixture(scope="module", params=["word_piece", "unigram", "byte_pairs", "demo", "tiny"])
def pair(request, chat, tmp_path_factory):
    """One tokenizer as it is read here, and as transformers reads it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "demo":
        folder = MODEL
    elif request.param == "tiny":
        chat("chatml").save_pretrained(folder)
    else:
        own = PreTrainedTokenizerFast(
            tokenizer_object=globals()[request.param](), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        own.save_pretrained(folder)
    light = read_tokenizer(Model(name_or_path=str(folder)))
    assert light is not None
    return light, AutoTokenizer.from_pretrained(folder)


def test_drawn_texts_have_the_same_tokens_places_and_words(pair):
    light, full = pair

    @FEW
    @given(texts=st.lists(TEXT, min_size=1, max_size=3))
    def same(texts):
        ours, theirs = (t(texts, add_special_tokens=False, return_attention_mask=False) for t in pair)
        assert ours["input_ids"] == theirs["input_ids"]
        for row, text in enumerate(texts):
            assert light(text)["input_ids"] == full(text)["input_ids"]
            for character in range(len(text)):
                assert ours.char_to_token(row, character) == theirs.char_to_token(row, character)
            for token in range(len(ours["input_ids"][row])):
                one, other = ours.token_to_chars(row, token), theirs.token_to_chars(row, token)
                assert (one.start, one.end) == (other.start, other.end)
        ids = ours["input_ids"]
        assert light.batch_decode(ids, skip_special_tokens=False) == full.batch_decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert light.decode(ids[0]) == full.decode(ids[0], skip_special_tokens=False)

    same()


def test_both_know_the_same_special_tokens(pair):
    light, full = pair
    names = ("special_tokens_map", "all_special_tokens", "all_special_ids", "bos_token", "eos_token_id", "unk_token")
    for name in (*names, "bos_token_id", "eos_token", "unk_token_id", "chat_template"):
        assert getattr(light, name) == getattr(full, name), name
    assert len(light) == len(full)
    assert {i: (t.content, t.special) for i, t in light.added_tokens_decoder.items()} == {
        i: (t.content, t.special) for i, t in full.added_tokens_decoder.items()
    }
    assert light.convert_ids_to_tokens(3) == full.convert_ids_to_tokens(3)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_writes_the_same_conversation(chat, tmp_path, name):
    chat(name).save_pretrained(tmp_path)
    light, full = (
        load_template(t)
        for t in (read_tokenizer(Model(name_or_path=str(tmp_path))), AutoTokenizer.from_pretrained(tmp_path))
    )
    assert (light.tail, light.closing, light.stop, light.specials) == (
        full.tail,
        full.closing,
        full.stop,
        full.specials,
    )
    assert (light.text_arguments, light.thought_way) == (full.text_arguments, full.thought_way)

    @FEW
    @given(turns=st.lists(st.tuples(TEXT, TEXT, TEXT | st.none()), min_size=1, max_size=3), prompt=st.booleans())
    def same(turns, prompt):
        messages = []
        for asked, said, thought in turns:
            answer = {"role": "assistant", "content": said, "reasoning_content": thought, "tool_calls": None}
            messages += [{"role": "user", "content": asked}, answer]
        assert light.render(messages, None, prompt) == full.render(messages, None, prompt)
        assert light.tagged == full.tagged
        if light.tagged:
            assert light.tagged_spans(messages) == full.tagged_spans(messages)

    same()


def test_prepared_rows_are_the_same(rows):
    full = AutoTokenizer.from_pretrained(MODEL)
    data = Data(train=[Source(path="rows")])
    made = [
        prepare_data(data, tokenizer, seed=0, wanted=TOKENS, given=rows).train
        for tokenizer in (read_tokenizer(Model(name_or_path="demo")), full)
    ]
    assert len(made[0]) == len(made[1]) > 0
    for one, other in zip(made[0].head(5), made[1].head(5), strict=True):
        assert np.array_equal(one.input_ids, other.input_ids)
        assert np.array_equal(one.labels, other.labels)


def test_a_template_cannot_leave_the_sandbox(chat, tmp_path):
    from jinja2.exceptions import SecurityError
    from luthier.data.tokenise.plain.plain_jinja import render_chat

    for template in (
        "{{ messages.__class__.__mro__ }}",
        "{% set n = namespace(_x=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ messages.append(1) }}",
    ):
        with pytest.raises(SecurityError):
            render_chat(template, [{"role": "user", "content": "hi"}], {})


DOUBLING = "{{% set n = namespace(x='ab') %}}{{% for i in range(60) %}}{{% set n.x = {} %}}{{% endfor %}}{{{{ n.x }}}}"


@pytest.mark.parametrize("doubled", ["n.x + n.x", "n.x ~ n.x", "n.x * 2", "[n.x, n.x] | join"])
def test_a_template_that_doubles_its_text_is_stopped_before_the_memory_is_full(doubled, chat):
    with expect_error("data-row", None, "characters"):
        render_messages(chat("chatml"), DOUBLING.format(doubled), [{"role": "user", "content": "a"}], None, False, {})


@pytest.mark.parametrize(
    "settings_of_it",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"add_bos_token": True},
        {"eos_token": "<new>"},
        {"auto_map": {"A": "b"}},
        {"image_token": "<new>"},
    ],
    ids=str,
)
def test_what_only_transformers_knows_is_left_to_it(chat, tmp_path, settings_of_it):
    chat("chatml").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    assert read_tokenizer(Model(name_or_path=str(tmp_path))) is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | settings_of_it))
    assert read_tokenizer(Model(name_or_path=str(tmp_path))) is None
    assert read_tokenizer(Model(name_or_path="some/hub-model")) is None


def test_a_template_makes_dicts_and_does_not_get_at_the_class():
    from luthier.data.tokenise.plain.plain_jinja import render_chat

    text = "{{ dict(a=1) }} {{ dict.fromkeys(['b'], 2) }} {{ dict is callable }} {{ dict }}"
    made, shown = render_chat(text, [], {})[0].split(" True ")
    assert made == "{'a': 1} {'b': 2}" and "<class" not in shown


def test_a_setting_of_transformers_own_is_not_passed_over(chat, tmp_path):
    chat("chatml").save_pretrained(tmp_path)
    light = read_tokenizer(Model(name_or_path=str(tmp_path)))
    with pytest.raises(ValueError, match="continue_final_message"):
        light.apply_chat_template([{"role": "user", "content": "a"}], continue_final_message=True)


@pytest.mark.parametrize("file", [{"config.json": {"model_type": "qwen2"}}, {"added_tokens.json": {"<new>": 3072}}])
def test_a_file_by_which_transformers_tokenises_otherwise_leaves_it_to_that(chat, tmp_path, file):
    chat("chatml").save_pretrained(tmp_path)
    for name, content in file.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read_tokenizer(Model(name_or_path=str(tmp_path))) is None


@pytest.mark.slow
def test_no_type_of_model_that_is_read_from_its_files_has_a_tokenizer_class_of_its_own(chat, tmp_path):
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    chat("chatml").save_pretrained(tmp_path)
    others = set()
    for name in TOKENIZER_MAPPING_NAMES:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
        if read_tokenizer(Model(name_or_path=str(tmp_path))) is None:
            continue
        try:
            read = AutoTokenizer.from_pretrained(tmp_path)
        except Exception:  # noqa: BLE001, S112 - a type that cannot be read with such a config is read by nobody
            continue
        if type(read).__name__ not in CLASSES:
            others.add(name)
    assert others == set()


def test_inspect_imports_neither_torch_nor_transformers(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    source = (
        "import sys\nfrom luthier.cli import main\n"
        f"sys.argv = ['luthier', 'inspect', '--model', 'demo', '--data', {str(rows)!r}]\n"
        "try:\n    main()\n"
        "except SystemExit:\n    print('', *{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    assert "tokens supervised" in done.stdout
    assert not {"torch", "transformers"} & set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("damage", [{"decoder": {"type": 0}}, {"added_tokens": [1]}], ids=str)
def test_a_damaged_file_is_explained_by_the_code_that_reads_models(damage, chat, tmp_path):
    chat("chatml").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(LuthierError) as caught:
        luthier.inspect(model=str(tmp_path), data=[{"prompt": "a", "completion": "b"}])
    assert (caught.value.code, caught.value.where) == ("model-not-found", str(path))


@pytest.mark.parametrize("own", [True, False])
def test_a_text_that_the_tokenizer_refuses_is_named_by_its_row(own, tmp_path):
    """A vocabulary of pieces without an unknown one has no token for a new character."""
    core = Tokenizer(models.Unigram([("a", -1.0), ("<s>", -2.0)]))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<s>").save_pretrained(tmp_path)
    read = read_tokenizer(Model(name_or_path=str(tmp_path))) if own else AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "ab"}\n')
    with pytest.raises(LuthierError) as caught:
        prepare_data(Data(train=[Source(path=str(tmp_path / "rows.jsonl"))], cache=False), read, seed=0)
    assert (caught.value.code, caught.value.where) == ("data-row", f"{tmp_path / 'rows.jsonl'}:2")
