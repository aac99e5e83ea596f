"""`luthier generate` and `luthier merge`, on what `luthier train` made."""

import inspect
import json

import pytest
from luthier import api
from luthier.cli import models


def test_generate_in_a_process_of_its_own_prints_one_document(command, trained, tiny):
    result = command("generate", tiny / "run", "How much is 1 and 1?", "--max-new-tokens", "4", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["prompt"] == "How much is 1 and 1?"
    assert isinstance(found["text"], str)


def test_merge_in_a_process_of_its_own_gives_a_folder_that_generates(command, luthier, trained, tiny, tmp_path):
    result = command("merge", tiny / "run", "--output-dir", tmp_path / "merged", "--json")
    assert result.returncode == 0, result.stderr
    merged = json.loads(result.stdout)["merged"]
    assert merged == str(tmp_path / "merged")
    words = ("How much is 1 and 1?", "--max-new-tokens", "4", "--json")
    assert (
        luthier("generate", merged, *words).document["text"]
        == luthier("generate", tiny / "run", *words).document["text"]
    )


def test_a_prompt_may_come_from_standard_input(luthier, trained, tiny):
    result = luthier("generate", tiny / "run", "--max-new-tokens", "2", "--json", stdin="hello\n")
    assert result.status == 0, result.stderr
    assert result.document["prompt"] == "hello"


def test_the_answer_alone_is_on_stdout(luthier, trained, tiny):
    words = ("generate", tiny / "run", "hello", "--max-new-tokens", "4")
    assert luthier(*words).stdout == luthier(*words, "--json").document["text"] + "\n"


def test_a_folder_without_a_model_is_an_error(luthier, tmp_path):
    for words in (["generate", tmp_path, "hello", "--json"], ["merge", tmp_path, "--json"]):
        result = luthier(*words)
        assert result.status == 2
        assert result.document["error"]["code"] in ("artifact-not-found", "model-not-found", "run-not-found")


@pytest.mark.parametrize("words", [["--temperature", "-1"], ["--top-p", "2"], ["--max-new-tokens", "0"]])
def test_a_setting_outside_its_bounds_is_refused(luthier, tiny, words):
    result = luthier("generate", tiny / "run", "hello", *words, "--json")
    assert (result.status, result.document["error"]["code"]) == (2, "usage")


@pytest.mark.parametrize("verb", ["generate", "merge"])
def test_the_verb_has_the_options_and_defaults_of_the_python_function(verb):
    ours = inspect.signature(getattr(models, verb)).parameters
    apart = {"json", "log_level", "log_format", "log_file"}
    theirs = dict(inspect.signature(getattr(api, verb)).parameters)
    theirs.pop("on_text", None)  # the terminal's, or a program's
    assert set(ours) - apart == set(theirs)
    for name, parameter in theirs.items():
        if parameter.default is not inspect.Parameter.empty:
            assert ours[name].default == parameter.default


def test_a_function_is_told_the_answer_piece_by_piece(tiny):
    pieces = []
    text = api.generate(tiny / "llama", "hello", max_new_tokens=4, on_text=pieces.append)
    assert "".join(pieces) == text and len(pieces) > 1
