"""Every verb's `--json` keeps one schema: verbs and schemas are the same set, and what is printed validates.

The fixture `luthier` holds every document of the other tests of this folder to its schema too.
"""

from __future__ import annotations

import json

import jsonschema
import pytest
import typer
from luthier.cli.app import app
from luthier.cli.documents.document_schemas import document_schema, list_verbs, read_blocks


def commands(group, above=()):
    """The verbs of a group that have a flag --json, with the words before them."""
    for name, command in group.commands.items():
        words = (*above, name)
        if any("--json" in parameter.opts for parameter in command.params):
            yield " ".join(words)
        yield from commands(command, words) if hasattr(command, "commands") else ()


def test_each_verb_that_prints_json_has_a_schema_and_no_other():
    assert sorted(commands(typer.main.get_command(app))) == sorted(list_verbs())


@pytest.mark.parametrize("verb", list_verbs())
def test_a_verbs_schema_is_sound_takes_an_error_and_refuses_what_it_does_not_name(verb, luthier):
    schema = document_schema(verb)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    told = json.loads(luthier(*verb.split(), "--no-such-option", "--json").stdout)
    assert validator.is_valid(told) and told["error"]["code"]
    if "open" not in read_blocks()[verb].records:
        assert not validator.is_valid({"error": {**told["error"], "extra": 1}})
        assert not validator.is_valid({"extra": 1})


def test_every_record_that_a_type_names_is_there():
    blocks = read_blocks()
    for verb in list_verbs():
        text = json.dumps(document_schema(verb))
        assert all(f'"{name}"' in text for name in blocks if f"#/$defs/{name}" in text)
        jsonschema.Draft202012Validator(document_schema(verb)).is_valid({})  # every reference is found


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    """A run of three steps in a folder of runs, as the verbs of runs look for it."""
    import luthier

    folder = tmp_path_factory.mktemp("documents") / "runs/mine"
    luthier.train(tiny / "r.yaml", output_dir=folder)
    return folder


def test_the_documents_of_a_runs_verbs_validate(luthier, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(run_folder.parent.parent)
    merged = tmp_path / "merged"
    for words in (
        ("runs",), ("runs", "show", "mine"), ("runs", "diff", "mine", "mine"), ("runs", "replay", "mine", "--dry-run"),
        ("plan", run_folder / "recipe.yaml"), ("inspect", run_folder / "recipe.yaml"),
        ("generate", run_folder, "How?", "--max-new-tokens", 2), ("evaluate", run_folder),
        ("merge", run_folder, "--output-dir", merged), ("export", merged, "--format", "gguf"), ("unmerge", merged, run_folder,
        "--output-dir", tmp_path / "base"), ("combine", run_folder, run_folder, "--output-dir", tmp_path / "both"),
        ("push", run_folder, "me/mine", "--dry-run"),
    ):  # fmt: skip
        result = luthier(*words, "--json")
        assert result.status == 0, result.stdout


@pytest.mark.slow  # a job is a process; the tests of each verb hold its document too
def test_the_documents_of_a_jobs_verbs_validate(luthier, run_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_JOBS", str(tmp_path / "jobs"))
    recipe = run_folder / "recipe.yaml"
    job = luthier("submit", recipe, "--provider", "local", "--output-dir", tmp_path / "job", "--json").document["job"]
    for words in (("status",), ("logs",), ("attach",), ("download",), ("cancel",)):
        more = ("--output-dir", tmp_path / "result") if words == ("download",) else ()
        assert luthier(*words, job["id"], *more, "--json").status == 0
    assert luthier("jobs", "--json").document["total"] == 1
    assert luthier("estimate", recipe, "--at", "local", "--json").document["estimates"]


def test_the_schema_of_a_verb_is_printed_and_written_and_an_unknown_verb_is_refused(luthier, tmp_path):
    assert json.loads(luthier("schema", "--of", "runs show").stdout) == document_schema("runs show")
    path = tmp_path / "plan.json"
    assert luthier("schema", "--of", "plan", "--output", path, "--json").document == {"path": str(path)}
    assert json.loads(path.read_text()) == document_schema("plan")
    refused = luthier("schema", "--of", "run", "--json").document["error"]
    assert (refused["code"], refused["where"]) == ("usage", "--of")
    assert "runs" in refused["remedy"]
