"""Errors that name the culprit: the key, the character, the template or the id that is wrong, not what tripped over it."""

from __future__ import annotations

import json

import pytest
from luthier import LuthierError
from luthier.data.read.sources import read_source
from luthier.recipe.schema import Source

ROW = {"prompt": "hi", "completion": "yo"}
FILES = {  # a file's name and text -> what its error says
    "semicolons.csv": ("prompt;completion\nhi;yo\n", ["';'", "one column", "','"]),
    "tabs.csv": ("prompt\tcompletion\nhi\tyo\n", ["'\\t'", "Name the file .tsv."]),
    "bars.csv": ("prompt|completion\nhi|yo\n", ["'|'"]),
    "commas.tsv": ("prompt,completion\nhi,yo\n", ["','", "'\\t'"]),
    "line.jsonl": (json.dumps([ROW, ROW]), ["an array in JSON", "line.json."]),
    "lines.jsonl": (json.dumps([ROW, ROW], indent=1), ["an array in JSON", "lines.json."]),
    "rows.jsonl": (f"[{json.dumps(ROW)},\n{json.dumps(ROW)}]", ["an array in JSON"]),
    "object.ndjson": (json.dumps(ROW, indent=1), ["an object over several lines", "object.json."]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_under_the_wrong_name_or_with_another_delimiter_is_told_so(name, tmp_path):
    text, said = FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(LuthierError) as caught:
        list(read_source(Source(path=str(tmp_path / name))))
    assert caught.value.code == "data-unreadable" and caught.value.where == f"{tmp_path / name}:1"
    assert all(words in str(caught.value) for words in said)


SINGLE = {"one.csv": "text\na;b\n", "odd.csv": '"what; is: it?"\na\n', "quoted.csv": 'text\n"a;b"\n'}


@pytest.mark.parametrize("name", SINGLE)
def test_one_column_with_such_characters_is_a_column(name, tmp_path):
    (tmp_path / name).write_text(SINGLE[name])
    assert len(list(read_source(Source(path=str(tmp_path / name))))) == 1


def chat_row(*messages):
    return {"messages": [{"role": "user", "content": "Q"}, *messages, {"role": "assistant", "content": "A"}]}


def refusal(made, row, tokenizer, **options):
    with pytest.raises(LuthierError) as caught:
        made([row], tokenizer, **options)
    return caught.value


@pytest.mark.parametrize("key", ["value", "content", "txt"])
def test_a_text_part_under_another_key_is_named_with_the_one_expected(key, chat, made):
    row = {
        "messages": [{"role": "user", "content": [{"type": "text", key: "hi"}]}, {"role": "assistant", "content": "yo"}]
    }
    error = refusal(made, row, chat("chatml"))
    assert error.where == "data[0]: messages[0].content[0]"
    assert "under 'text'" in error.problem and f"has '{key}'" in error.problem


def several(chat):
    tokenizer = chat.__wrapped__("chatml")
    tokenizer.chat_template = {"rag": chat("qwen").chat_template, "plain": chat("chatml").chat_template}
    return tokenizer


def test_named_templates_without_a_default_are_listed(chat, made):
    error = refusal(made, chat_row(), several(chat))
    assert error.code == "template-missing" and "rag" in error.problem and "plain" in error.problem
    assert "data.chat_template: rag" in error.remedy


def test_a_named_template_may_be_chosen(chat, made):
    rows = [chat_row()]
    for name, same in (("plain", "chatml"), ("rag", "qwen")):
        chosen = made(rows, several(chat), chat_template=name)
        assert chosen.train.fingerprint == made(rows, chat(same)).train.fingerprint


def test_templates_in_a_list_are_read_as_files_of_tokenizers_hold_them(chat, made):
    tokenizer = chat.__wrapped__("chatml")
    tokenizer.chat_template = [{"name": "default", "template": chat("chatml").chat_template}]
    assert made([chat_row()], tokenizer).train.fingerprint == made([chat_row()], chat("chatml")).train.fingerprint


CALL = {"type": "function", "id": "c1", "function": {"name": "look", "arguments": {"at": "it"}}}
CALLING = (
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "5", "tool_call_id": "c1"},
)


def test_a_template_that_knows_no_calls_is_named_as_such(chat, made):
    error = refusal(made, chat_row(*CALLING), chat("chatml"))
    assert error.code == "template-unprovable" and error.where == "data[0]"
    assert "messages[1]" in error.problem


WISH = "Tool call IDs should have 9 characters!"


def test_a_call_id_that_a_template_wants_otherwise_is_named(chat, made):
    template = chat("qwen").chat_template.replace(
        "{%- for call in message.tool_calls or [] -%}",
        "{%- for call in message.tool_calls or [] -%}{%- if call.id | length != 9 -%}"
        f"{{{{ raise_exception('{WISH}') }}}}{{%- endif -%}}",
    )
    error = refusal(made, chat_row(*CALLING), chat("chatml"), chat_template=template)
    assert error.code == "data-row" and error.where == "data[0]"
    assert all(fact in error.problem for fact in (WISH, "messages[1]", "assistant", "'c1'"))


def test_a_role_that_a_template_refuses_is_named_with_its_message(chat, made):
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('Unexpected') }}{% endif %}"
    template += (
        "{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}</s>{% endfor %}"
    )
    error = refusal(made, chat_row(*CALLING), chat("chatml"), chat_template=template)
    assert all(fact in error.problem for fact in ("Unexpected", "messages[2]", "tool"))


def test_a_character_without_a_token_is_told(made):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    rows = [{"prompt": "a ", "completion": "b"}, {"prompt": "a ", "completion": "b 漢"}]
    report = made(rows, tokenizer).report
    assert report.changes == {"undecodable": 1} and "1 of 2 rows" in report.warnings[0]
    assert made([{"text": "a"}, {"text": "漢"}], tokenizer).report.changes == {"undecodable": 1}
