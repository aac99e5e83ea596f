"""OpenAI's own SDK drives the fake through a whole job, and sends what the provider sends."""

import json

import attrs
import luthier
import openai
import pytest
from luthier import JobState, LuthierError, ProviderError
from luthier.testing import expect_error
from openai.types.fine_tuning import job_create_params
from pydantic import ConfigDict, TypeAdapter, with_config


@pytest.fixture
def sdk(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)


def submitted(manager, fake, server, rows, options=None, **more):
    provider = {"name": "openai", "base_url": f"{server.url}/v1", "dialect": "openai", **(options or {})}
    return manager.submit_sync({"model": fake.model, "data": str(rows), "provider": provider, **more})


def last_body(server):
    return [r for r in server.requests if r.method == "POST" and r.path == "/v1/fine_tuning/jobs"][-1].json


def test_the_sdk_completes_a_job_at_the_fake(sdk, fake, rows):
    file = sdk.files.create(file=rows.open("rb"), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(model=fake.model, training_file=file.id, method={"type": "supervised"})
    assert job.status == "validating_files"
    fake.set_state(job.id, "succeeded")
    assert sdk.fine_tuning.jobs.retrieve(job.id).fine_tuned_model.startswith("ft:")
    assert [j.id for j in sdk.fine_tuning.jobs.list()] == [job.id]
    assert [e.type for e in sdk.fine_tuning.jobs.list_events(job.id)] == ["metrics"] * 4 + ["message"]
    assert [c.step_number for c in sdk.fine_tuning.jobs.checkpoints.list(job.id)] == [2]
    assert sdk.files.content("file-result").read().startswith(b"step,train_loss")
    other = sdk.fine_tuning.jobs.create(model=fake.model, training_file=file.id)
    assert sdk.fine_tuning.jobs.cancel(other.id).status == "cancelled"


CASES = [
    ({}, {}, {"method": {"type": "supervised"}}),
    ({"num_train_epochs": 3.0}, {}, {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}}}),
    ({"global_batch_size": 16, "seed": 3}, {"suffix": "mine"},
     {"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 16}}}, "seed": 3, "suffix": "mine"}),
    ({}, {"learning_rate_multiplier": 0.5},
     {"method": {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 0.5}}}}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "options", "asked"), CASES, ids=str)
def test_the_provider_sends_what_the_sdk_sends_and_nothing_that_was_not_set(
    manager, sdk, fake, server, rows, given, options, asked
):
    job = submitted(manager, fake, server, rows, options, **given)
    ours = last_body(server)
    metadata = {"luthier_job": job.id}
    sdk.fine_tuning.jobs.create(model=fake.model, training_file=ours["training_file"], metadata=metadata, **asked)
    assert ours == last_body(server)
    strict = with_config(ConfigDict(extra="forbid"))(job_create_params.JobCreateParams)
    TypeAdapter(strict).validate_python(ours)


def test_the_file_that_arrives_is_the_one_that_the_sdk_would_send(manager, sdk, fake, server, rows):
    job = submitted(manager, fake, server, rows)
    ours = [r for r in server.requests if r.path == "/v1/files"][-1].form()
    with job.spec.files["training"].path.open("rb") as file:
        sdk.files.create(file=file, purpose="fine-tune")
    theirs = [r for r in server.requests if r.path == "/v1/files"][-1].form()
    assert (ours["file"], ours["purpose"]) == (theirs["file"], theirs["purpose"])
    assert fake.rows(job.remote_id) == [json.loads(line) for line in rows.read_text().splitlines()]


def in_parts(server, size):
    part = luthier.provider("openai", api_key="k", base_url=f"{server.url}/v1", dialect="openai")
    part.terms = attrs.evolve(part.terms, whole_bytes=size, part_bytes=size)
    return part


def upload_requests(server):
    """The requests of an upload in parts: bodies, and the parts' own bytes."""
    asked = [r for r in server.requests if r.path.startswith("/v1/uploads")]
    return [r.form()["data"] if r.path.endswith("/parts") else r.json for r in asked]


def test_a_large_file_goes_in_the_parts_that_the_sdk_would_send(manager, sdk, fake, server, rows):
    job = manager.submit_sync({"model": fake.model, "data": str(rows)}, provider=in_parts(server, 500))
    sent = job.spec.files["training"]
    ours = upload_requests(server)
    server.requests.clear()
    sdk.uploads.upload_file_chunked(
        file=sent.path,
        filename=f"{job.id}-{sent.path.name}",
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=500,
    )
    theirs = upload_requests(server)
    assert ours[:-1] == theirs[:-1] and len(ours) == 2 + -(-sent.size // 500) > 3
    assert set(ours[-1]) == {"part_ids"} <= set(theirs[-1]) and ours[-1]["part_ids"] == theirs[-1]["part_ids"]
    assert fake.rows(job.remote_id) == [json.loads(line) for line in rows.read_text().splitlines()]
    assert list(job.spec.folder.glob("parts-*")) == []


def test_an_upload_that_was_cut_goes_on_with_the_part_that_is_missing(manager, fake, server, rows):
    from luthier.testing import Fault, Reply

    recipe = {"model": fake.model, "data": str(rows)}
    broken = Fault(kind="answer", method="POST", path="/complete$", reply=Reply(status=500, body={}), times=1)
    server.faults = [broken]
    with pytest.raises(ProviderError):
        manager.submit_sync(recipe, provider=in_parts(server, 500))
    (waiting,) = manager.list_sync()
    sent = server.count("POST", "/parts$")
    manager.use_provider(waiting.id, in_parts(server, 500))
    job = manager.attach_sync(waiting.id)
    assert (server.count("POST", "/uploads$"), server.count("POST", "/parts$")) == (1, sent)
    assert len(fake.rows(job.remote_id)) == 12


def test_an_upload_that_the_service_has_no_more_begins_anew(manager, fake, server, rows):
    from luthier.testing import Fault, Reply

    server.faults = [Fault(kind="answer", method="POST", path="/complete$", reply=Reply(status=500, body={}), times=1)]
    with pytest.raises(ProviderError):
        manager.submit_sync({"model": fake.model, "data": str(rows)}, provider=in_parts(server, 500))
    gone = Reply(status=400, body={"error": {"message": "Upload has expired", "code": "invalid_upload"}})
    server.faults = [Fault(kind="answer", method="POST", path="/complete$", reply=gone, times=1)]
    (waiting,) = manager.list_sync()
    manager.use_provider(waiting.id, in_parts(server, 500))
    job = manager.attach_sync(waiting.id)
    assert server.count("POST", "/uploads$") == 2 and len(fake.rows(job.remote_id)) == 12


def test_a_hosted_model_is_named_and_its_metrics_are_downloaded(manager, fake, server, rows, tmp_path):
    job = submitted(manager, fake, server, rows)
    fake.set_state(job.remote_id, "succeeded")
    ended = manager.wait_sync(job.id)
    assert (ended.state, ended.status.result_model) == (JobState.COMPLETED, f"ft:{fake.model}:me::{job.remote_id}")
    assert (manager.metrics_sync(job.id).tokens, manager.metrics_sync(job.id).train_loss) == (4321, 1.0)
    with pytest.raises(ProviderError, match="ft:gpt-4.1-mini"):
        manager.download_sync(job.id)
    got = manager.download_sync(job.id, tmp_path / "got", kind="metrics")
    assert list(got.files) == ["metrics-0.csv"]


def test_why_a_job_failed_is_told(manager, fake, server, rows):
    job = submitted(manager, fake, server, rows)
    fake.set_state(job.remote_id, "failed")
    assert manager.wait_sync(job.id).reason == "exceeded_quota: line 3 is odd: field training_file"


def test_a_service_that_ignores_the_filter_is_read_through(manager, fake, server, rows):
    from luthier.testing import Fault

    fake.heeds_filter = False
    for _ in range(3):
        submitted(manager, fake, server, rows)
    server.faults = [Fault(kind="lost", method="POST", path="/fine_tuning/jobs$")]
    assert submitted(manager, fake, server, rows).remote_id == "ftjob-4"
    assert len(fake.jobs()) == 4


def test_a_list_that_repeats_itself_is_cut_off(manager, fake, server, rows):
    from luthier.testing import Fault, Reply

    job = submitted(manager, fake, server, rows)
    item = {"id": "ftevent-1", "created_at": 1, "level": "info", "message": "m", "type": "message", "data": None}
    again = Reply(body={"data": [item], "has_more": True})
    server.faults = [Fault(kind="answer", method="GET", path="/events$", reply=again, times=9)]
    with expect_error("provider-protocol", "openai: GET /fine_tuning/jobs/ftjob-1/events"):
        manager.events_sync(job.id)


def test_azure_gets_its_own_key_header_and_training_type(manager, fake, server, rows):
    fake.key_header = "api-key"
    job = submitted(manager, fake, server, rows, {"dialect": "azure", "api_version": "2025-04-01"})
    assert last_body(server)["trainingType"] == "globalStandard"
    assert all(r.headers["api-key"] == "k" and "authorization" not in r.headers for r in server.requests)
    manager.status_sync(job.id)
    manager.cancel_sync(job.id)
    assert all(r.first("api-version") == "2025-04-01" for r in server.requests)


@pytest.mark.parametrize(("address", "dialect"), [
    ("https://api.openai.com/v1", "openai"), ("https://me.openai.azure.com/openai", "azure"),
    ("https://me.services.ai.azure.com/api/projects/p/openai/v1/", "azure"), ("https://api.tokenfactory.nebius.com/v1", "compatible"),
    ("http://localhost:8000/v1", "compatible"),
])  # fmt: skip
def test_the_dialect_follows_from_the_address(address, dialect):
    assert luthier.provider("openai", api_key="k", base_url=address).terms.dialect == dialect


def test_a_rate_is_refused_with_what_to_write_instead(manager, fake, server, rows):
    with pytest.raises(LuthierError, match="learning_rate_multiplier"):
        submitted(manager, fake, server, rows, learning_rate=1e-5)
    assert server.requests == []


def test_the_end_of_self_serve_tuning_is_told(manager, fake, server, rows):
    told = []
    provider = {"name": "openai", "base_url": f"{server.url}/v1", "dialect": "openai"}
    manager.submit_sync({"model": fake.model, "data": str(rows)}, provider=provider, listener=told.append)
    assert any("2027-01-06" in finding.message for finding in told[0].findings)
    assert told[0].cost.amount is None  # the service chooses the epochs


def test_too_few_rows_are_refused(manager, fake, server, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    with expect_error("data-row", "training.jsonl", "10"):
        submitted(manager, fake, server, few)
    assert server.requests == []
