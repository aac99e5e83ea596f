"""`luthier chat`: through a pipe, on a terminal, beside the base model."""

import inspect
import io
import json
import os
import pty
import re
import shutil
import signal
import sys

import luthier as package
import pytest
from luthier.cli import models
from luthier.cli.app import app
from luthier.cli.model_verbs import chat as verb
from luthier.cli.screen.chat.answer_views import Columns, printable
from luthier.cli.screen.chat.session import stopping_answers
from luthier.cli.screen.chat.slash_commands import HELP, Leave, put_row, run_command
from luthier.testing import expect_error
from luthier.training.trained.open_chat import open_chats
from rich.console import Console

FEW = ("--max-new-tokens", "4")


@pytest.fixture
def chat(luthier, tiny):
    """`chat("a line", ..., model="run", flags=[...])`: what becomes of lines that are piped in."""

    def run(*lines, model="llama", flags=()):
        return luthier("chat", tiny / model, *FEW, *flags, stdin="".join(line + "\n" for line in lines))

    return run


def test_each_line_of_a_pipe_is_a_message_and_each_answer_is_printed_alone(chat):
    plain, told = chat("hello", "", "and now?"), chat("hello", "and now?", flags=["--json"])
    assert (plain.status, plain.stderr) == (0, "")
    assert [turn["prompt"] for turn in told.document] == ["hello", "and now?"]
    assert plain.stdout == "".join(turn["text"] + "\n" for turn in told.document)


def test_bytes_that_are_no_text_fail_their_line_and_the_mark_of_a_file_is_none_of_it(luthier, tiny):
    piped = b"\xef\xbb\xbfhello\r\n\xff\nhello"
    first, failed, last = luthier("chat", tiny / "llama", *FEW, "--json", stdin=piped).document
    assert (first["prompt"], last["prompt"], failed["error"]["where"]) == ("hello", "hello", "standard input")
    assert luthier("generate", tiny / "llama", *FEW, "--json", stdin=piped[:10]).document["prompt"] == "hello"


def test_a_turn_has_what_is_documented(chat):
    first, second = chat("hello", "and now?", flags=["--json"]).document
    assert list(first) == [
        "turn",
        "prompt",
        "text",
        "ended",
        "tokens",
        "prompt_tokens",
        "kept_tokens",
        "base",
        "seconds",
    ]
    assert (first["turn"], second["turn"], first["base"], first["ended"], first["tokens"]) == (1, 2, None, "length", 4)
    assert second["prompt_tokens"] > first["prompt_tokens"]


def test_the_first_answer_is_that_of_generate_with_the_same_flags(chat, luthier, tiny):
    flags = ["--temperature", "1.5", "--top-p", "0.9", "--seed", "3", "--system", "Be odd."]
    (turn,) = chat("hello", flags=[*flags, "--json"]).document
    assert turn["text"] == luthier("generate", tiny / "llama", "hello", *FEW, *flags, "--json").document["text"]
    assert turn["text"] != chat("hello", flags=["--json"]).document[0]["text"]
    again = chat("hello", "/reset", "hello", flags=[*flags, "--json"]).document
    assert again[0]["text"] == turn["text"] != again[1]["text"]  # each turn draws anew


def test_reset_forgets_and_the_system_message_stays(chat):
    said = chat("/system Be odd.", "hello", "more", "/reset", "hello", "/system", "/reset", "hello", flags=["--json"])
    first, _, again, without = said.document
    assert (again["prompt_tokens"], again["text"]) == (first["prompt_tokens"], first["text"])
    assert without["prompt_tokens"] < first["prompt_tokens"]
    assert "system: Be odd." in said.stderr and "a new conversation" in said.stderr


def test_a_saved_conversation_is_a_row_and_another_one_is_added(chat, tiny, tmp_path):
    file = tmp_path / "rows.jsonl"
    for _ in range(2):
        result = chat("/system Be odd.", "//hello", f"/save {file}")
        assert result.status == 0, result.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0] == rows[1]
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert rows[0]["messages"][1]["content"] == "/hello"
    assert package.inspect(model=str(tiny / "llama"), data=str(file)).report.rows == 2


def test_a_conversation_that_is_saved_again_is_one_row_that_has_grown(chat, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": []}\n')
    save = f"/save {file}"
    assert chat("hello", save, save, "and now?", save, "/reset", "hello", save).status == 0
    assert [len(json.loads(line)["messages"]) for line in file.read_text().splitlines()] == [0, 4, 2]


def test_what_another_has_added_since_a_save_stays(tmp_path):
    file = tmp_path / "rows.jsonl"
    for before, row, kept in ((b"", b"one\n", b"one\n"), (b"one\n", b"one two\n", b"one two\n"),
                              (b"lost\n", b"three\n", b"one two\nthree\n")):  # fmt: skip
        put_row(file, row, before)
        assert file.read_bytes() == kept
    file.write_bytes(b"without an end")
    put_row(file, b"four\n", b"")
    assert file.read_bytes() == b"without an end\nfour\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/rest", "Did you mean /reset?"),
        ("/xyz", "/help lists them"),
        ("/save", "the file's name is missing"),
        ("/save x.jsonl", "the conversation is empty"),
    ],
)
def test_a_wrong_command_is_told_and_the_chat_goes_on(chat, line, said):
    result = chat(line, "hello")
    assert said in result.stderr
    assert (result.status, len(result.stdout.splitlines()) >= 1) == (2, True)
    error, turn = chat(line, "hello", flags=["--json"]).document
    assert (error["prompt"], error["error"]["code"], turn["turn"]) == (line, "usage", 1)


def test_a_file_that_cannot_be_written_is_told(chat, tmp_path):
    error = chat("hello", f"/save {tmp_path}", flags=["--json"]).document[1]["error"]
    assert (error["code"], error["where"]) == ("path-unwritable", str(tmp_path))


def test_help_names_every_command():
    told = []
    run_command("/help", [], told.append)
    assert told == [HELP]
    for name in ("reset", "system", "save", "help", "quit"):
        assert f"/{name}" in HELP
    with pytest.raises(Leave):
        run_command("/quit", [], told.append)
    with expect_error("usage", "/hlp"):
        run_command("/hlp", [], told.append)


def test_quit_leaves_what_comes_after_it_unread(chat):
    assert chat("/quit", "hello").stdout == ""


def test_a_run_is_compared_with_its_base(chat, trained, tiny):
    (turn,) = chat("hello", model="run", flags=["--compare", "--json"]).document
    (alone,) = chat("hello", model="run", flags=["--json"]).document
    assert turn["text"] == alone["text"]
    assert list(turn["base"]) == ["text", "ended", "tokens", "prompt_tokens", "kept_tokens"]
    talks = open_chats(tiny / "run", base=None, system=None, device="cpu", step=None, best=False)
    assert talks["base"].ask("hello", package.Sampling(max_new_tokens=4)).text == turn["base"]["text"]
    plain = chat("hello", model="run", flags=["--compare"]).stdout
    assert plain == f"base: {turn['base']['text']}\ntuned: {turn['text']}\n"


def test_where_one_of_two_models_fails_neither_was_asked(chat, tiny, tmp_path):
    short = shutil.copytree(tiny / "llama", tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100}))
    flags = ["--compare", "--base", tiny / "llama", "--json"]
    first, failed, again = chat("hello", "long " * 60, "hello", model=short, flags=flags).document
    assert failed["error"]["code"] == "recipe-out-of-range"
    assert again["prompt_tokens"] == again["base"]["prompt_tokens"] < 2 * first["prompt_tokens"] + 20
    plain = chat("hello", "hello", flags=["--compare", "--base", tiny / "llama", "--json"]).document[1]
    assert again["prompt_tokens"] == plain["prompt_tokens"]


def test_a_model_alone_has_nothing_to_be_compared_with_unless_it_is_named(chat, luthier, tiny):
    result = luthier("chat", tiny / "llama", "--compare", stdin="hello\n")
    assert result.status == 2 and "Name the base model with --base" in result.stderr
    (turn,) = chat("hello", flags=["--compare", "--base", tiny / "llama", "--json"]).document
    assert turn["base"]["text"] == turn["text"]


def test_a_run_of_plain_prompts_has_no_place_for_a_system_message(chat, trained):
    result = chat("/system Be odd.", "hello", model="run")
    assert result.status == 2 and "plain text" in result.stderr and result.stdout


def test_the_sampling_flags_are_those_of_generate():
    ours, theirs = (inspect.signature(f).parameters for f in (verb.chat, models.generate))
    assert set(theirs) - set(ours) == {"prompt"}
    assert set(ours) - set(theirs) == {"compare"}
    apart = {"max_new_tokens"}
    assert all(ours[n].default == theirs[n].default for n in theirs.keys() & ours.keys() - apart - {"prompt"})


@pytest.fixture
def typed(monkeypatch, capsys, tiny):
    """`typed("hello\\n", model, ...)`: the status and both outputs where these keys are typed at a terminal."""

    def run(keys, *words):
        keyboard, line = pty.openpty()
        with os.fdopen(line, "r") as terminal, os.fdopen(keyboard, "wb", buffering=0) as hands:
            hands.write(keys.encode())
            monkeypatch.setattr(sys, "stdin", terminal)
            with pytest.raises(SystemExit) as end:
                app(["chat", *(str(word) for word in words), *FEW])
        return end.value.code, *capsys.readouterr()

    return run


def test_at_a_terminal_a_title_comes_first_and_errors_end_with_status_0(typed, tiny):
    status, out, err = typed("/rest\n/help\nhello\n\x04", tiny / "llama")
    assert status == 0
    assert err.startswith(f"{tiny / 'llama'}; /help lists the commands")  # as answers go into a pipe here
    assert HELP.splitlines()[0] in err and "(cut after 4 tokens" in err and err.count("> ") == 4
    assert "Did you mean /reset?" in err
    assert len(out.splitlines()) == 1


def test_the_title_of_a_model_of_plain_prompts_says_so(typed, trained, tiny):
    assert "each message is continued by itself" in typed("/quit\n", tiny / "run")[2]


def test_a_pipe_to_a_model_of_plain_prompts_says_so_on_standard_error(chat, trained):
    said = chat("/quit", model="run")
    assert "each message is continued by itself" in said.stderr
    assert (said.status, said.stdout) == (0, "")


@pytest.mark.parametrize("width", [80, 120])
def test_two_columns_fit_the_terminal_and_nothing_is_lost(width):
    file = io.StringIO()
    columns = Columns(Console(file=file, width=width, force_terminal=True, color_system=None, legacy_windows=False))
    with columns.shown(), columns.column("base") as tell:
        for word in ["word "] * 40:
            tell(word)
        columns.texts["tuned"] = "x" * 200
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    last = plain[plain.rindex("base") :].splitlines()
    assert all(len(row) <= width for row in last)
    assert sum(row.count("word") for row in last) == 40 and sum(row.count("x") for row in last) == 200


def test_nothing_that_commands_a_terminal_is_written_to_it():
    assert printable("a\x1b[2Jb\x07\n\tc\x9b") == "a[2Jb\n\tc"


def test_a_first_ctrl_c_is_noted_and_a_second_one_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with stopping_answers() as leave:
        assert not leave()
        signal.raise_signal(signal.SIGINT)
        assert leave()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
