"""The verbs of jobs on the command line, in process; what they submit runs in a worker process."""

import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO

import attrs
import pytest
from luthier.builtin.workers.local_worker import is_worker_alive
from luthier.cli.job_verbs.submit import find_alike
from luthier.cli.screen.jobs_view import draw_log
from luthier.jobs.store.job_store import JobStore
from luthier.plugins.providing.job_records import DataFile, JobSpec
from rich.console import Console

STEPS = 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with rows and `r.yaml`; jobs are stored below it, and none is left running."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUTHIER_JOBS", str(tmp_path / "store"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = [{"prompt": f"{i} and {j} is", "completion": str(i + j)} for i in range(4) for j in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(
        f"model: demo\ndata: rows.jsonl\nadapter: lora\nmax_steps: {STEPS}\noutput_dir: run\n"
    )
    yield tmp_path
    store = JobStore(tmp_path / "store")
    for job in store.list_jobs():
        if is_worker_alive(job.spec.folder):
            os.kill(json.loads((job.spec.folder / "worker.json").read_text())["pid"], signal.SIGTERM)
        while is_worker_alive(job.spec.folder):
            time.sleep(0.05)
    store.close()


def test_a_job_is_submitted_followed_listed_shown_and_downloaded(luthier, folder):
    done = luthier("submit", "r.yaml", "--provider", "local", "--wait", "--json")
    assert done.status == 0, done.stderr
    job = done.document["job"]
    assert job["state"] == "completed"
    assert luthier("jobs", "--follow", "--json").document["jobs"][0]["state"] == "completed"
    assert f"submitted {job['id']} to local" in done.stderr
    assert done.stderr.count("loss") == STEPS
    listed = luthier("jobs", "--json").document["jobs"]
    assert [(j["id"], j["state"], j["stage"]) for j in listed] == [(job["id"], "completed", "created")]
    assert luthier("jobs", "--status", "failed", "--json").document["jobs"] == []
    shown = luthier("status", job["id"][-6:], "--json").document
    assert (shown["progress"]["step"], shown["progress"]["total_steps"]) == (STEPS, STEPS)
    assert [step["step"] for step in shown["journal"]][:4] == ["intent", "uploaded", "creating", "created"]
    events = luthier("logs", job["id"], "--json").document["events"]
    assert [e["metrics"]["step"] for e in events] == [1, 2, 3]
    got = luthier("download", job["id"], "--output-dir", "got", "--json").document["artifact"]
    assert (got["kind"], got["base_model"]) == ("adapter", "demo")
    assert (folder / "got/adapter_config.json").is_file()
    assert luthier("attach", job["id"], "--json").document["job"]["state"] == "completed"
    for verb in (("jobs",), ("status", job["id"]), ("logs", job["id"]), ("download", job["id"])):
        plain = luthier(*verb)
        assert plain.status == 0, plain.stderr
        assert plain.stdout.strip()


def test_a_second_submission_finds_the_first_as_long_as_it_has_not_ended(folder, tmp_path):
    store = JobStore(tmp_path / "store")
    file = DataFile(path=folder / "rows.jsonl", role="train", rows=12, size=9, sha256="aa")
    first = JobSpec(id="a-1", provider="p", options={}, scope="", model="m", method="sft", settings={"seed": 1},
                    folder=tmp_path, output_dir=tmp_path / "a-1", files={"train": file})  # fmt: skip
    second = attrs.evolve(first, id="a-2", output_dir=tmp_path / "a-2", created=5.0)
    store.add_job(first, 0.0)
    store.add_job(second, 5.0)
    assert find_alike(store, second) == ["a-1"]
    assert find_alike(store, attrs.evolve(second, settings={"seed": 2})) == []
    assert find_alike(store, attrs.evolve(second, files={"train": attrs.evolve(file, sha256="bb")})) == []
    store.note_canceled("a-1", "asked", 6.0)
    assert find_alike(store, second) == []
    store.close()


def test_a_job_that_fails_is_an_error_with_its_reason(luthier, folder):
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    done = luthier("submit", "r.yaml", "--wait", "--json")
    assert done.status == 1
    assert done.document["error"]["code"] == "job-failed"
    assert "rows.jsonl:2" in done.document["error"]["message"]


def test_ctrl_c_detaches_and_says_how_to_come_back(folder):
    words = [sys.executable, "-m", "luthier", "submit", "r.yaml", "--set", "max_steps=5000", "--wait"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs would ignore it
    process = subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    line = process.stderr.readline()
    assert line.startswith("submitted "), line + process.stderr.read()
    id = line.split()[1]
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"luthier attach {id}" in told
    store = JobStore(folder / "store")
    assert is_worker_alive(store.get_job(id).spec.folder)
    store.close()


def test_a_job_is_cancelled(luthier, folder):
    job = luthier("submit", "r.yaml", "--set", "max_steps=5000", "--json").document["job"]
    luthier("cancel", job["id"], "--json")
    done = luthier("attach", job["id"], "--json")
    assert (done.status, done.document["error"]["code"]) == (1, "job-canceled")


def test_a_recipe_that_is_wrong_makes_no_job(luthier, folder):
    assert luthier("submit", "r.yaml", "--learning-rat", "3").status == 2
    assert luthier("submit", "r.yaml", "--provider", "nowhere").status == 2
    assert luthier("jobs", "--json").document["jobs"] == []


def test_a_job_that_is_not_there_is_said(luthier, folder):
    for verb in ("status", "logs", "cancel", "download", "attach"):
        done = luthier(verb, "nothing", "--json")
        assert (done.status, done.document["error"]["code"]) == (2, "job-not-found")
    assert (
        luthier("jobs", "--status", "runing", "--json").document["error"]["remedy"].startswith("Did you mean 'running'")
    )


def test_providers_are_listed_shown_and_checked(luthier, folder):
    assert "local" in [p["name"] for p in luthier("providers", "--json").document["providers"]]
    shown = luthier("providers", "show", "local", "--json").document
    assert (shown["takes"], shown["weights"]) == ("recipe", ["adapter", "model"])
    assert "cpu" in luthier("providers", "check", "local", "--json").document["devices"]
    for words in ((), ("show", "local"), ("check", "local")):
        assert luthier("providers", *words).status == 0


def test_an_estimate_names_each_provider_asked_for(luthier, folder):
    found = luthier("estimate", "r.yaml", "--at", "local", "--json").document["estimates"]
    assert [(e["provider"], e["amount"], e["refused"]) for e in found] == [("local", None, None)]
    assert luthier("estimate", "r.yaml").status == 0
    assert luthier("jobs", "--json").document["jobs"] == []


def test_an_estimate_of_several_recipe_providers_is_refused(luthier, folder):
    refused = luthier("estimate", "r.yaml", "--provider", "local", "--provider=ray", "--json")
    assert (refused.document["error"]["code"], refused.document["error"]["where"]) == ("usage", "--provider")


def test_a_dry_run_of_a_submission_shows_the_job_and_makes_none(luthier, folder):
    shown = luthier("submit", "r.yaml", "--dry-run", "--json")
    assert shown.document["prepared"]["provider"] == "local"
    assert luthier("submit", "r.yaml", "--dry-run").status == 0
    assert luthier("jobs", "--json").document["jobs"] == []
    assert not (folder / "run").exists()


def test_the_options_that_a_provider_has_are_shown_with_their_defaults(luthier, folder):
    shown = luthier("providers", "show", "local", "--json").document["known_options"]
    assert {option["name"]: option["default"] for option in shown} == {"nproc_per_node": None}
    assert "nproc_per_node" in luthier("providers", "show", "local").stdout


def test_the_log_of_a_job_without_events_says_how_it_ended(luthier, folder):
    assert luthier("submit", "r.yaml", "--wait").status == 0
    store = JobStore(folder / "store")
    (job,) = store.list_jobs()
    store.close()
    screen = Console(file=StringIO(), width=80)
    draw_log(screen, job, [], [])
    assert job.state.value in screen.file.getvalue()


def test_a_provider_is_asked_with_options_of_its_own(luthier):
    shown = luthier("providers", "show", "local", "--option", "nproc_per_node=2", "--json").document
    assert shown["options"]["nproc_per_node"] == "2"
    refused = luthier("providers", "check", "local", "--option", "nproc_per_node", "--json")
    assert (refused.status, refused.document["error"]["code"]) == (2, "recipe-syntax")
