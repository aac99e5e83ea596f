"""How a command ends: one document or tables on stdout, errors with code and status, no traceback for a user's error."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from luthier.cli.screen.answers import Answer, Turns, conclude_command
from luthier.cli.screen.tables import draw_section, plain_table
from luthier.error_lists import join_errors
from luthier.errors import CODES, LuthierError


def raising(error):
    def work():
        raise error

    return work


class Interrupted(BaseException):
    exit_status = 143


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize("code", CODES)
def test_an_error_has_its_code_and_status_with_json_and_without(code, capsys):
    error = LuthierError(code, "it went wrong", where="a.yaml:3", found=[1], remedy="Do this.")
    assert conclude_command(raising(error), as_json=True) == error.exit_status
    told = json.loads(capsys.readouterr().out)["error"]
    assert (told["code"], told["where"], told["found"], told["remedy"]) == (code, "a.yaml:3", "[1]", "Do this.")
    assert code in told["message"]
    assert conclude_command(raising(error), as_json=False) == error.exit_status
    shown = capsys.readouterr()
    assert shown.out == ""
    line = "a.yaml:3: it went wrong (found [1])"
    if code != "internal":
        assert shown.err.splitlines() == [line if code == "interrupted" else f"error: {line} [{code}]", "Do this."]


def test_lines_of_a_table_in_a_pipe_end_with_their_last_character(capsys):
    table = plain_table("name", "text")
    table.add_row("a", "short")
    table.add_row("b", "much longer")

    def view(screen):
        draw_section(screen, "Title", table)
        screen.out("as it is  ", highlight=False)

    conclude_command(lambda: Answer(document={}, view=view), as_json=False)
    assert capsys.readouterr().out == "Title\n  name  text\n  a     short\n  b     much longer\n\nas it is  \n"


def test_an_error_of_a_verb_of_turns_is_a_document_on_one_line(capsys):
    turns = Turns(work=lambda tell: tell({"turn": 1}) or raising(LuthierError("data-row", "bad"))())
    assert conclude_command(lambda: turns, as_json=True) == 2
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first, last["error"]["code"]) == ({"turn": 1}, "data-row")


def test_errors_with_the_same_problem_share_a_line_and_those_with_the_same_remedy_tell_it_once(capsys):
    told = [("a", "one", "Do this."), ("b", "two", "Do that."), ("c", "one", "Do this."), ("d", "three", "Do this.")]
    errors = [LuthierError("data-row", problem, where=place, remedy=remedy) for place, problem, remedy in told]
    conclude_command(raising(join_errors(errors)), as_json=False)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith(("  ", "Do"))] == ["  a", "  c", "Do this.", "Do that."]
    assert [line.startswith("error: ") for line in lines].count(True) == 3


def test_a_long_error_stays_on_one_line(capsys):
    conclude_command(raising(LuthierError("data-row", "x" * 500)), as_json=False)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_an_error_of_several_lines_is_shown_on_one(capsys):
    conclude_command(raising(LuthierError("data-row", "one\ntwo")), as_json=False)
    assert capsys.readouterr().err.splitlines()[0] == "error: one two [data-row]"


def test_half_a_character_can_be_printed_as_json(capsys):
    assert conclude_command(lambda: Answer(document={"text": "\udc80"}, view=None), as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "\udc80"}


def test_brackets_in_a_message_are_shown_as_they_are(capsys):
    conclude_command(raising(LuthierError("data-row", "expected list[str] and [red]")), as_json=False)
    assert "list[str] and [red]" in capsys.readouterr().err


def test_with_json_only_the_document_is_on_stdout(capsys):
    def work():
        print("noise of a library")
        return Answer(document={"a": Path("x"), "b": float("nan"), "c": {1, 2}, "d": (1.5,)}, view=None)

    assert conclude_command(work, as_json=True) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"a": "x", "b": None, "c": [1, 2], "d": [1.5]}
    assert "noise" in shown.err


def test_an_answer_decides_the_status():
    assert conclude_command(lambda: Answer(document={}, view=lambda screen: None, status=1), as_json=False) == 1


def test_a_defect_shows_its_traceback_on_stderr_and_exits_with_one(capsys):
    assert conclude_command(raising(ZeroDivisionError("division")), as_json=True) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["code"] == "internal"
    assert "Traceback" in shown.err


@pytest.mark.parametrize(
    ("error", "status"), [(LuthierError("interrupted", "stopped"), 130), (Interrupted("saved step 3"), 143)]
)
def test_an_interrupted_command_exits_with_the_signal_and_shows_no_traceback(error, status, capsys):
    assert conclude_command(raising(error), as_json=False) == status
    assert conclude_command(raising(error), as_json=True) == status
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [str(error).partition(". Run")[0]]  # no error, and nothing to repeat
    assert json.loads(shown.out)["error"]["code"] == "interrupted"


def test_ctrl_c_in_a_command_is_an_error_with_its_code_and_status(luthier, distribute):
    distribute("luthier-slow-to-load", "raise KeyboardInterrupt")
    result = luthier("plugins", "--json")
    assert (result.status, result.document["error"]["code"]) == (130, "interrupted")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), "disk-full"),
        (PermissionError(errno.EACCES, "Permission denied", "x.bin"), "path-unwritable"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "dependency-missing"),
        (ModuleNotFoundError("No module named 'torch'", name="torch.nn"), "dependency-missing"),
        (ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere"), "internal"),
    ],
)
def test_what_the_system_refuses_has_a_code(error, code, capsys):
    conclude_command(raising(error), as_json=True)
    assert json.loads(capsys.readouterr().out)["error"]["code"] == code


def test_an_unknown_verb_or_flag_is_an_error_with_the_users_status(luthier):
    for arguments in (["trane", "--json"], ["doctor", "--deep", "--json"], ["plugins", "show", "--json"]):
        result = luthier(*arguments)
        assert result.status == 2
        assert result.document["error"]["code"] == "usage"
    told = luthier("doctor", "--deep").stderr.splitlines()
    assert told[0].startswith("error: ")
    assert "--deep" in told[0]
    assert told[1:] == ["See `luthier doctor --help`."]


def test_version_is_printed(luthier):
    import luthier as package

    assert luthier("--version").stdout.strip() == package.__version__


def test_a_closed_pipe_is_no_error():
    line = f"{sys.executable} -m luthier plugins | head -c 1"
    result = subprocess.run(line, shell=True, capture_output=True, text=True, check=False, timeout=60)
    assert result.stderr == ""
