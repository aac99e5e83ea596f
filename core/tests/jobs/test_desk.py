"""What travels to another machine, and what its desk is asked and answers."""

import json

import pytest
from luthier import Manager, ProviderError, Recipe, desk_words, read_desk
from luthier.builtin.workers.worker_desk import answer
from luthier.jobs.desk.desk_words import MARK
from luthier.jobs.desk.metric_lines import read_fresh_lines
from luthier.jobs.desk.parcel import pack_job


def said(capsys, *words):
    """What the desk wrote, with a shell's own lines before it."""
    assert answer(list(words)) == 0
    return "Welcome to gpu-box\n" + capsys.readouterr().out


def test_a_parcel_holds_the_rows_and_a_recipe_that_names_them_over_there(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    given = {"model": "demo", "data": {"train": [{"path": str(tmp_path / "[ab].jsonl"), "max_rows": 5}, {"path": "some/hub-set"}],
             "validation": [{"path": str(tmp_path / "c.jsonl")}]}, "max_steps": 3}  # fmt: skip
    manager = Manager(tmp_path / "store")
    prepared_folder = tmp_path / "job"
    prepared_folder.mkdir()
    Recipe.from_dict(given).write(prepared_folder / "recipe.yaml")
    job = type("Spec", (), {"folder": prepared_folder})
    files = pack_job(job, "/over/there", "2")
    manager.close()
    recipe = Recipe.load(files["recipe.yaml"], environ={})
    assert [s.path for s in recipe.data.train] == [
        "/over/there/data/0-a.jsonl",
        "/over/there/data/1-b.jsonl",
        "some/hub-set",
    ]
    assert [s.max_rows for s in recipe.data.train] == [5, 5, None]
    assert [s.path for s in recipe.data.validation] == ["/over/there/data/2-c.jsonl"]
    assert (recipe.output_dir, recipe.max_steps) == ("/over/there/run", 3)
    assert all(files[name].read_text() for name in ("data/0-a.jsonl", "data/1-b.jsonl", "data/2-c.jsonl"))
    launch = json.loads(files["launch.json"].read_text())
    assert launch["run"] == "/over/there/run" and launch["arguments"][-2:] == ["--nproc-per-node", "2"]


def test_a_desk_tells_what_is_not_there_by_its_kind(tmp_path, capsys):
    with pytest.raises(ProviderError) as caught:
        read_desk(said(capsys, "status", str(tmp_path)), "ssh: x")
    assert caught.value.kind == "not_found"
    assert read_desk(said(capsys, "list", str(tmp_path), "5"), "x") == []
    assert read_desk(said(capsys, "artifacts", str(tmp_path)), "x") == []
    assert read_desk(said(capsys, "events", str(tmp_path), "0"), "x") == {"events": [], "cursor": "0"}


def test_a_run_that_is_cancelled_before_its_turn_ends_as_soon_as_it_begins(tmp_path, capsys):
    (tmp_path / "launch.json").write_text(
        json.dumps({"arguments": ["-c", "raise SystemExit(9)"], "run": str(tmp_path / "run")})
    )
    assert read_desk(said(capsys, "cancel", str(tmp_path)), "x") is True
    answer(["run", str(tmp_path)])
    capsys.readouterr()
    status = read_desk(said(capsys, "status", str(tmp_path)), "x")
    assert (status["state"], status["raw_state"]) == ("canceled", "exit 143")


@pytest.mark.parametrize("text", ["", "bash: luthier: not found", MARK, f"{MARK}{{", "{}"])
def test_an_answer_that_is_none_is_told(text):
    with pytest.raises(ProviderError) as caught:
        read_desk(text, "x")
    assert caught.value.kind == "protocol"


def test_a_kind_that_is_not_known_is_the_machines_failure():
    with pytest.raises(ProviderError) as caught:
        read_desk(MARK + json.dumps({"error": {"kind": "odd", "message": "m"}}), "x")
    assert caught.value.kind == "server"
    assert desk_words("status", "/f") == ["-m", "luthier.builtin.workers.worker_desk", "status", "/f"]


def test_a_file_that_was_written_anew_is_read_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(100)))
    offset = read_fresh_lines(path, 0).offset
    path.write_text("".join(f'{{"loss": 1, "step": {i}}}\n' for i in range(300)))
    fresh = read_fresh_lines(path, offset, 64)
    assert len(fresh.lines) == 300 and fresh.offset == path.stat().st_size
