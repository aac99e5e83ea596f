"""Folders: an artifact is replaced whole, and nothing is that Luthier has not written."""

import json

import pytest
from luthier.artifacts.folders import write_artifact
from luthier.errors import LuthierError

NOTE = {"format": 1, "model": {"name_or_path": "org/base"}, "artifact": "model"}


def write(folder):
    (folder / "new.txt").write_text("new")


def refused(folder):
    with pytest.raises(LuthierError) as caught:
        write_artifact(folder, lambda aside: pytest.fail("it began to write"), NOTE)
    return caught.value


@pytest.fixture
def artifact(tmp_path):
    """A folder that was written with a note."""
    return write_artifact(tmp_path / "made", lambda aside: (aside / "old.txt").touch(), NOTE)


def test_an_artifact_is_replaced_by_the_next(artifact):
    write_artifact(artifact, write, NOTE)
    assert sorted(path.name for path in artifact.iterdir()) == ["README.md", "luthier.json", "new.txt"]
    assert [path.name for path in artifact.parent.iterdir()] == ["made"]


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_project_and_a_model_that_others_wrote_stay(tmp_path, name):
    (tmp_path / "proj" / "src").mkdir(parents=True)
    for file in (name, "precious.txt", "src/main.py"):
        (tmp_path / "proj" / file).write_text(json.dumps({}))
    error = refused(tmp_path / "proj")
    assert (error.code, error.where) == ("run-folder-other", str(tmp_path / "proj"))
    assert {path.name for path in (tmp_path / "proj").rglob("*")} == {name, "precious.txt", "src", "main.py"}


@pytest.mark.parametrize(("file", "thing"), [("main.py", "folder"), ("config.json", "model")])
def test_what_somebody_put_below_an_artifact_stays(artifact, file, thing):
    (artifact / "mine").mkdir()
    (artifact / "mine" / file).write_text("mine")
    error = refused(artifact)
    assert (error.code, error.where) == ("run-folder-other", str(artifact / "mine"))
    assert thing in error.problem and (artifact / "mine" / file).read_text() == "mine"


def test_the_templates_of_a_tokenizer_are_replaced_with_it(artifact):
    (artifact / "additional_chat_templates").mkdir()
    write_artifact(artifact, write, NOTE)
    assert not (artifact / "additional_chat_templates").exists()


def test_the_working_folder_and_those_around_it_are_refused(artifact, monkeypatch):
    (artifact / "luthier.json").write_text("{}")
    monkeypatch.chdir(artifact)
    for name in (".", "..", "", str(artifact)):
        error = refused(type(artifact)(name))
        assert (error.code, error.where, error.found) == ("path-unwritable", "output_dir", name or ".")
    write_artifact(type(artifact)("below") / ".." / "beside", write)  # no folder is made of a name with dots
    assert (artifact / "beside" / "new.txt").is_file() and not (artifact / "below").exists()


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert refused(path).code == "path-unwritable"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_to_an_artifact_stays_one(artifact):
    link = artifact.with_name("link")
    link.symlink_to(artifact)
    write_artifact(link, write, NOTE)
    assert link.is_symlink() and (artifact / "new.txt").is_file()
