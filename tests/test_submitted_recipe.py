"""`docs/recipes/sft.yaml` at every hosted provider's fake: cut off while its rows are sent, gone on with, and whole."""

import gzip
import importlib.util
import json
import os
import sys
from pathlib import Path

import attrs
import pytest
from luthier.cli.app import app
from luthier.jobs.clock import use_clock
from luthier.testing import Fault, LoopbackServer
from luthier.testing.providers.virtual_clock import VirtualClock
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "docs/recipes/sft.yaml"
HOSTED = ("openai", "together", "fireworks", "bedrock", "vertex", "anyscale")
KEY = "SUBMITTED_RECIPE_KEY"
ROWS = 30


def fake_of(name):
    """The fake service with which the plugin `name` is tested."""
    path = ROOT / f"plugins/{name}/tests/fake_{name}.py"
    specification = importlib.util.spec_from_file_location(f"submitted_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    [made] = [c for n, c in vars(module).items() if n.startswith("Fake") and c.__module__ == specification.name]
    return made()


def flags_of(options):
    """The options of a provider as flags; those that have their defaults are left out."""
    for field in attrs.fields(type(options)):
        value = getattr(options, field.name)
        if value != field.default:
            yield from (f"--provider.{field.name.replace('_', '-')}", str(value))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder that has what the recipe reads."""
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    lines = [json.dumps({"question": f"What is {i} plus {i}?", "answer": str(2 * i)}) + "\n" for i in range(2 * ROWS)]
    with gzip.open(folder / "train.jsonl.gz", "wt") as file:
        file.writelines(lines[:ROWS])
    (folder / "test.jsonl").write_text("".join(lines[ROWS:]))
    monkeypatch.setenv("LUTHIER_DATA", str(folder.parent))
    monkeypatch.setenv("LUTHIER_JOBS", str(tmp_path / "store"))
    monkeypatch.setenv(KEY, "key-of-this-test")
    monkeypatch.chdir(tmp_path)


def run_command(*words):
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    return done.exit_code, json.loads(done.stdout)


@pytest.mark.parametrize("name", HOSTED)
def test_the_recipe_runs_a_whole_job_that_was_cut_and_is_gone_on_with(name, data):
    fake = fake_of(name)
    server = LoopbackServer(fake.answer)
    with server.running(), use_clock(VirtualClock()):
        words = (
            "submit",
            RECIPE,
            "--model",
            fake.model,
            "--provider",
            name,
            *flags_of(fake.options(server.url, f"env:{KEY}")),
        )
        method, path = fake.upload
        server.faults = [Fault(kind="refused", method=method, path=path, times=99)]
        status, document = run_command(*words)
        assert status != 0
        [job] = run_command("jobs")[1]["jobs"]
        assert (job["stage"], fake.jobs()) == ("uploading", [])
        server.faults = [Fault(kind="lost", method=fake.create[0], path=fake.create[1])]
        status, document = run_command("attach", job["id"], "--no-wait")
        assert (status, len(fake.jobs())) == (0, 1), document
        [remote] = fake.jobs()
        assert len(fake.rows(remote)) == ROWS
        fake.set_state(remote, next(raw for raw, state in fake.states.items() if state == "completed"))
        assert run_command("attach", job["id"])[1]["job"]["state"] == "completed"
        status, document = run_command("download", job["id"], "--output-dir", "got")
    if fake.download is None:
        assert document["error"]["code"] == "provider-unsupported"
    else:
        assert status == 0, document
        assert os.listdir("got")
    assert len(fake.jobs()) == 1
