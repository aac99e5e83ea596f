"""`luthier new-plugin`: a package on the disk, and what to do next."""

import json

import pytest


def test_new_plugin_in_a_process_of_its_own_prints_one_document(command, tmp_path):
    result = command("new-plugin", "warm", "--kind", "optimizer", "--folder", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout)
    assert made["path"] == str(tmp_path / "luthier-warm")
    assert "pyproject.toml" in made["files"]
    assert all((tmp_path / "luthier-warm" / name).is_file() for name in made["files"])
    assert made["next"][0].startswith("pip install -e ")


def test_new_plugin_says_what_it_made_and_what_comes_next(luthier, tmp_path):
    text = luthier("new-plugin", "warm", "--kind", "loss", "--folder", tmp_path).stdout
    for line in ("pyproject.toml", "pip install -e", "luthier plugins show loss warm"):
        assert line in text


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["warm", "--kind", "losss"], "part-unknown"),
        (["Warm!", "--kind", "loss"], "plugin-name"),
        (["sgd", "--kind", "optimizer"], "plugin-name"),
        (["warm"], "usage"),
    ],
)
def test_a_plugin_that_cannot_be_made_is_an_error(luthier, tmp_path, words, code):
    result = luthier("new-plugin", *words, "--folder", tmp_path, "--json")
    assert (result.status, result.document["error"]["code"]) == (2, code)
    assert not list(tmp_path.iterdir())
