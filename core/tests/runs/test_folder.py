"""One run's folder: its state, its numbers, and that no damage makes a reader fail."""

import fcntl
import json
import math
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from luthier.runs.compare import compare_runs
from luthier.runs.details import flatten_tree, run_details, size
from luthier.runs.metrics_file import last_lines
from luthier.runs.run_folder import free_folder, read_folder

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["run_id", "state", "step", "total_steps", "created", "parts", "note", "result", "versions", "health", "data"]


def test_a_whole_run_is_told_in_one_line(make):
    run = read_folder(make())
    found = run.summary()
    assert found["state"] == "completed"
    assert (found["model"], found["adapter"]) == ("demo", "full")
    assert (found["step"], found["total_steps"], found["loss"]) == (3, 5, 1.0)
    assert 7190 < found["age"] < 7300
    assert found["damage"] is None


@pytest.mark.parametrize("state", ["stopped", "completed", "failed"])
def test_a_run_that_has_ended_is_in_the_state_that_it_recorded(make, state):
    assert read_folder(make(state=state)).state == state


def test_a_run_is_running_while_its_lock_is_held_and_killed_afterwards(make):
    folder = make(state="running")
    (folder / "lock").write_text("pid 1 since then\n")
    assert read_folder(folder).state == "killed"
    with (folder / "lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read_folder(folder).state == "running"
    assert read_folder(folder).state == "killed"


def test_a_process_that_was_killed_leaves_a_killed_run(make):
    folder = make(state="running")
    source = (
        f"import fcntl, sys\nf = open({str(folder / 'lock')!r}, 'a+')\nfcntl.flock(f, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    assert read_folder(folder).state == "running"
    process.kill()
    process.communicate()
    assert read_folder(folder).state == "killed"


def test_a_child_that_holds_the_lock_of_a_dead_run_does_not_keep_it_alive(make):
    import socket

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder = make(state="running")
    with (folder / "lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for owner, state in (
            (f"pid {gone.pid} on {socket.gethostname()}", "killed"),
            ("pid 1 on elsewhere", "running"),
        ):
            file.truncate(0)
            file.write(f"{owner} since then\n")
            file.flush()
            assert read_folder(folder).state == state


def test_a_look_at_a_lock_leaves_it_free(make):
    folder = make(state="running")
    (folder / "lock").touch()
    with (folder / "lock").open("a+") as file:
        assert read_folder(folder).state == "killed"
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_last_line_that_a_kill_cut_short_is_left_out(make):
    folder = make(losses=[3.0, 2.5, 2.0])
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-15] + '\n[1, 2]\n\xff\n{"step": 9, "loss"')
    run = read_folder(folder)
    assert run.survey.series("loss") == [(1, 3.0), (2, 2.5)]
    assert run.latest("loss") == 2.5


def test_steps_that_a_resumed_process_took_again_count_once(make):
    folder = make(losses=[3.0, 2.5, 2.0])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 2.4}\n{"step": 3, "loss": 1.9}\n')
    assert read_folder(folder).survey.series("loss") == [(1, 3.0), (2, 2.4), (3, 1.9)]


def test_a_loss_that_is_none_is_no_number(make):
    folder = make(losses=[3.0, 2.5])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": null}\n{"step": 4, "loss": NaN}\n{"step": 5, "loss": "low"}\n')
    run = read_folder(folder)
    assert run.survey.series("loss") == [(1, 3.0), (2, 2.5)]
    assert run.latest("loss") == 2.5
    assert run.step == 5


def test_only_the_tail_of_a_long_file_is_read_for_the_list(make):
    folder = make(losses=[])
    lines = "".join(json.dumps({"step": i, "loss": 1 / i, "more": "x" * 90}) + "\n" for i in range(1, 4001))
    (folder / "metrics.jsonl").write_text(lines)
    run = read_folder(folder)
    assert run.step == 4000
    assert len(run.recent) < 600
    assert all(json.loads(line)["more"] == "x" * 90 for line in run.recent)
    assert len(run.survey.series("loss")) == 4000


def test_a_run_without_metrics_tells_what_its_record_holds(make):
    folder = make(record={"result": {"final_loss": 0.5, "eval_loss": 0.6}})
    (folder / "metrics.jsonl").unlink()
    run = read_folder(folder)
    assert (run.latest("loss"), run.latest("eval_loss"), run.step) == (0.5, 0.6, 3)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "run.json").unlink(), "it has no run.json"),
        (lambda f: (f / "run.json").write_text('{"run_id": "2026'), "run.json cannot be read"),
        (lambda f: (f / "run.json").write_bytes(b"\xff\xfe"), "run.json cannot be read"),
        (lambda f: (f / "run.json").write_text("[" * 100_000), "run.json cannot be read"),
        (lambda f: (f / "run.json").write_text("[]"), "is no run's record"),
        (lambda f: (f / "run.json").write_text('{"name": "a package"}'), "is no run's record"),
        (lambda f: ((f / "run.json").unlink(), (f / "run.json").mkdir()), "run.json cannot be read"),
    ],
    ids=["absent", "cut short", "binary", "deep", "a list", "another's", "a folder"],
)
def test_a_damaged_record_is_told_and_the_rest_is_read(make, damage, told):
    folder = make()
    damage(folder)
    run = read_folder(folder)
    assert run.state == "damaged"
    assert told in run.damage
    assert run.summary()["loss"] == 1.0
    assert run_details(run)["metrics"]["loss"]["first"] == 3.0


@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), metrics=st.binary(max_size=120))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_content_makes_a_reader_fail(make, tmp_path, changes, metrics):
    folder = tmp_path / "runs" / "one"
    if not folder.exists():
        make()
        (folder / "whole.json").write_text((folder / "run.json").read_text())
    whole = json.loads((folder / "whole.json").read_text())
    (folder / "run.json").write_text(json.dumps({**whole, **changes}))
    (folder / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n' + metrics + b"\n")
    run = read_folder(folder)
    assert isinstance(run.summary()["state"], str)
    assert run_details(run)["metrics"]["loss"]["first"] == 2.0
    assert compare_runs(run, run)["options"] == []


def test_a_recipe_that_is_missing_or_damaged_gives_no_settings(make):
    folder = make()
    assert read_folder(folder).settings()["model"]["name_or_path"] == "demo"
    (folder / "recipe.yaml").write_text("a: [")
    assert read_folder(folder).settings() is None
    (folder / "recipe.yaml").unlink()
    assert read_folder(folder).settings() is None


def test_details_hold_settings_parts_numbers_checkpoints_and_files(make):
    folder = make(learning_rate=5e-4, adapter="full", record={"health": {"skipped_steps": 1, "remarks": []}})
    whole = folder / "checkpoints" / "step-00000002"
    whole.mkdir(parents=True)
    (whole / "manifest.json").write_text("{}")
    (whole / "state.safetensors").write_bytes(b"x" * 1000)
    (folder / "checkpoints" / "step-00000003").mkdir()
    found = run_details(read_folder(folder))
    assert found["changed"]["learning_rate"] == 5e-4
    assert found["changed"]["model.name_or_path"] == "demo"
    assert not {"seed", "adapter.name", "optimizer.betas", "exact_callbacks.0.name"} & found["changed"].keys()
    assert found["settings"]["seed"] == 0
    assert found["metrics"]["loss"] == {"first": 3.0, "last": 1.0, "least": 1.0, "greatest": 3.0}
    assert found["metrics"]["tokens_per_second"]["median"] == 200.0
    assert [(c["name"], c["bytes"], c["finished"]) for c in found["checkpoints"]] == [
        ("step-00000002", 1002, True),
        ("step-00000003", 0, False),
    ]
    assert found["health"]["skipped_steps"] == 1
    assert {"run.json", "recipe.yaml", "metrics.jsonl", "checkpoints/"} <= {f["name"] for f in found["files"]}


def test_options_of_a_part_show_where_they_are_not_its_defaults(make):
    found = run_details(read_folder(make(optimizer={"name": "adamw", "eps": 1e-6}, exact_callbacks=["jsonl"])))
    assert found["changed"]["optimizer.eps"] == 1e-6
    assert found["changed"]["exact_callbacks.0.name"] == "jsonl"
    assert not [name for name in found["changed"] if name.startswith("optimizer.") and name != "optimizer.eps"]


def test_a_part_that_is_not_installed_shows_all_its_options(make):
    folder = make()
    text = (folder / "recipe.yaml").read_text().replace("name: full", "name: vanished\n  r: 3")
    (folder / "recipe.yaml").write_text(text)
    found = run_details(read_folder(folder))["changed"]
    assert (found["adapter.name"], found["adapter.r"]) == ("vanished", 3)


def test_a_tree_is_flattened_to_its_leaves():
    tree = {"a": {"b": 1, "c": {}}, "d": [1, 2], "e": [{"f": None}, {"f": [3]}], "g": []}
    assert flatten_tree(tree) == {"a.b": 1, "a.c": {}, "d": [1, 2], "e.0.f": None, "e.1.f": [3], "g": []}


def test_links_are_not_followed_for_a_folders_size(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "big").write_bytes(b"x" * 10**6)
    (tmp_path / "folder" / "link").symlink_to(tmp_path)
    assert size(tmp_path / "folder") < 10**4


def test_the_first_free_name_beside_a_folder(tmp_path):
    assert free_folder(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").touch()
    assert free_folder(tmp_path / "run") == tmp_path / "run-3"


def test_a_metrics_file_that_is_no_file_has_no_lines(tmp_path):
    assert last_lines(tmp_path) == []
    assert last_lines(tmp_path / "absent") == []


def test_numbers_that_no_float_holds_are_none(make):
    folder = make(record={"step": 10**400, "total_steps": True})
    run = read_folder(folder)
    assert (run.step, run.total_steps) == (3, None)
    assert not math.isnan(run.latest("loss"))


def test_reading_runs_loads_no_torch():
    script = (
        "import sys, luthier.runs.find, luthier.runs.compare, luthier.runs.replay, luthier.runs.chart, luthier.cli.runs\n"
        "print({'torch', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "set()\n"
    )
