"""A run that was sent whole: the worker unpacks its parcel, trains, tells by its output, and gives its result."""

import base64
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile

import pytest
from luthier import join_parcel, parcel_variables, read_told, sent_words, unpack_archive
from luthier.builtin.workers.sent_worker import ToldMetrics, main

PROGRAM = """
import json, pathlib, signal, sys
run = pathlib.Path(sys.argv[1]); (run / "adapter").mkdir(parents=True)
(run / "run.json").write_text(json.dumps({"run_id": "r", "state": "running", "total_steps": 2}))
lines = [json.dumps({"step": s, "loss": 1 / s}) + chr(10) for s in (1, 2)]
(run / "metrics.jsonl").write_text("".join(lines) + '{"step": 3')
print(json.dumps({"error": {"message": "the third step was cut"}}))
sys.exit(int(sys.argv[2]))
"""


def packed(**files):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return gzip.compress(made.getvalue())


def over_there(folder, variables):
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PET_")} | variables
    words = [sys.executable, *sent_words("run", str(folder))]
    return subprocess.run(words, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("code", [0, 3])
def test_the_worker_tells_its_metrics_and_how_it_ended(tmp_path, code):
    launch = {"arguments": ["-S", "-c", PROGRAM, str(tmp_path / "run"), str(code)], "run": str(tmp_path / "run")}
    variables = parcel_variables(packed(launch_json=json.dumps(launch)), 100_000)
    done = over_there(tmp_path / "work", variables | {"PET_NODE_RANK": "0"})
    assert done.stderr == ""
    told = read_told(["installing", *done.stdout.splitlines(), "luthier-told: {cut"])
    assert (done.returncode, told.code) == (code, code)
    assert told.reason == (None if code == 0 else "the third step was cut")
    assert told.results == {"adapter": str(tmp_path / "run/adapter")}
    assert [e.metrics for e in told.events] == [{"total_steps": 2}, {"step": 1, "loss": 1}, {"step": 2, "loss": 0.5}]
    assert read_told(done.stdout.splitlines()).events == told.events


def test_parcels_of_any_size_come_out_as_they_went_in():
    content = bytes(range(256)) * 2_000
    variables = parcel_variables(content, 700_000)
    assert len(variables) == 7 and all(len(value) <= 100_000 for value in variables.values())
    assert join_parcel({**variables, "PATH": "/bin"}) == content


def write_lines(path, *steps, loss=1.0):
    path.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step in steps))


@pytest.mark.parametrize("looked", [True, False], ids=["looked at while short", "grown again between two looks"])
def test_what_a_resumed_run_writes_anew_is_told_where_it_has_shortened_its_metrics(tmp_path, capsys, looked):
    metrics, path = ToldMetrics(tmp_path), tmp_path / "metrics.jsonl"
    write_lines(path, *range(1, 11))
    metrics.tell_fresh()
    write_lines(path, *range(1, 5))
    if looked:
        metrics.tell_fresh()
    write_lines(path, *range(1, 13), loss=0.25)
    metrics.tell_fresh()
    events = read_told(capsys.readouterr().out.splitlines()).events
    assert [e.metrics["step"] for e in events if e.metrics["loss"] == 0.25][-8:] == [*range(5, 13)]
    assert len({e.id for e in events}) == 22


def test_a_folder_that_is_given_is_read_and_unpacked_as_it_was(tmp_path, capsys):
    files = {"adapter_config.json": b"{}", "deep/adapter_model.safetensors": bytes(range(256)) * 999}
    for name, content in files.items():
        path = tmp_path / "adapter" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert main(["give", str(tmp_path / "adapter")]) == 0
    told = read_told(["a line of the program's own", *capsys.readouterr().out.splitlines()])
    (tmp_path / "packed").write_bytes(base64.b64decode(told.archive))
    (tmp_path / "got").mkdir()
    unpacked = unpack_archive(tmp_path / "packed", tmp_path / "got")
    assert {path.relative_to(tmp_path / "got").as_posix(): path.read_bytes() for path in unpacked} == files
