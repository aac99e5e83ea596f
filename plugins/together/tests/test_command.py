"""The command line at a service: a job cut off and gone on with, and a key that no output holds."""

import importlib.metadata
import json

import jsonschema
import pytest
from luthier.cli.app import app
from luthier.cli.documents.document_schemas import document_schema
from luthier.testing import Fault
from packaging.requirements import Requirement
from typer.testing import CliRunner

CANARY = "canary-2f-key-of-the-command-line"


@pytest.fixture
def command(tmp_path, monkeypatch, server):
    """`command("jobs", "--json")`: its exit status, its document, and all that it wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUTHIER_JOBS", str(tmp_path / "store"))
    monkeypatch.setenv("TOGETHER_API_KEY", CANARY)
    recipe = f"model: some/model-8b\ndata: rows.jsonl\nadapter: lora\nnum_train_epochs: 1\nprovider: {{name: together, base_url: '{server.url}'}}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    written = []

    def run(*words):
        done = CliRunner().invoke(app, [*words, "--json"])
        written.append(done.stdout + done.stderr)
        return done.exit_code, json.loads(done.stdout)

    yield run
    files = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert [text for text in (*written, *files) if CANARY in text] == []


def test_a_job_that_was_cut_off_is_gone_on_with_and_its_adapter_downloaded(command, fake, server, rows):
    server.faults = [Fault(kind="refused", method="PUT", path="/storage/", times=99)]
    status, document = command("submit", "r.yaml")
    assert (status, document["error"]["code"]) == (75, "provider-lost")
    _, listed = command("jobs")
    (job,) = listed["jobs"]
    assert (job["stage"], fake.jobs()) == ("uploading", [])
    server.faults = []
    status, document = command("attach", job["id"], "--no-wait")
    assert (status, document["job"]["stage"], len(fake.jobs())) == (0, "created", 1)
    fake.set_state(fake.jobs()[0], "completed")
    assert command("attach", job["id"])[1]["job"]["state"] == "completed"
    events = command("logs", job["id"])[1]["events"]
    assert [e["metrics"]["loss"] for e in events if e["kind"] == "metrics"] == [4.0, 2.0, 4 / 3, 1.0]
    assert command("download", job["id"], "--output-dir", "got")[1]["artifact"]["kind"] == "adapter"
    assert command("status", job["id"])[1]["metrics"]["cost"] == 2.5


def test_a_wrong_key_is_told_without_it(command, fake, server, rows, monkeypatch):
    from luthier.testing import Reply

    server.faults = [
        Fault(kind="answer", reply=Reply(status=401, body={"error": {"message": f"bad key {CANARY}"}}), times=9)
    ]
    status, document = command("submit", "r.yaml")
    assert (status, document["error"]["code"]) == (2, "provider-auth")
    assert len(server.requests) == 1


def test_an_estimate_names_the_price_and_sends_nothing(command, server, rows):
    _, document = command("estimate", "r.yaml", "--at", "together")
    (line,) = document["estimates"]
    assert line["refused"] is None and line["amount"] > 0 and "price list of" in line["basis"]
    assert server.requests == []


def test_a_provider_is_verified_with_options_of_its_own_and_any_price(command, fake, server, tmp_path):
    words = ("providers", "verify", "together", "--model", "some/model", "--option", f"base_url={server.url}")
    status, document = command(*words)
    assert (status, document["error"]["code"], fake.jobs()) == (2, "cost-above", [])
    status, document = command(*words, "--any-cost", "--option", "suffix=checked", "-o", "told.json")
    assert (status, document["state"], document["provider"]) == (0, "canceled", "together")
    assert jsonschema.Draft202012Validator(document_schema("providers verify")).is_valid(document)
    (made,) = fake.tunes.values()
    assert made["suffix"].startswith("checked-") and (tmp_path / "told.json").is_file()


def test_installing_it_brings_neither_torch_nor_a_vendors_sdk():
    found, wanted = set(), [Requirement("luthier-together"), Requirement("luthier[hosted]")]
    while wanted:
        asked = wanted.pop()
        found.add(asked.name.lower().replace("_", "-"))
        for text in importlib.metadata.requires(asked.name) or ():
            needed = Requirement(text)
            extras = [{"extra": extra} for extra in (*asked.extras, "")]
            applies = needed.marker is None or any(needed.marker.evaluate(extra) for extra in extras)
            if applies and needed.name.lower().replace("_", "-") not in found:
                wanted.append(needed)
    assert "httpx" in found
    assert not found & {"torch", "transformers", "together", "openai", "numpy"}
