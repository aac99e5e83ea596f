"""What is sent to Vertex AI, by the facts of Google's discovery document, and what is made of its answers."""

import asyncio
import json
import re

import luthier
import pytest
from fake_vertex import ADAPTER, FACTS, FOLDER, PARENT, fact_path, wrong_fields
from hypothesis import given
from hypothesis import strategies as st
from luthier import JobState, LuthierError, ProviderError
from luthier.testing import LoopbackServer, Reply, expect_error
from luthier_vertex import Vertex
from luthier_vertex.offer import gemini_row

LLAMA = "meta/llama3_1@llama-3.1-8b-instruct"


def options(server, **more):
    return {"base_url": server.url, "storage_url": server.url, "access_token": "env:TOKEN", "project": "p1",
            "location": "us-central1", "gcs_folder": FOLDER, **more}  # fmt: skip


def submitted(manager, fake, server, rows, given=None, **more):
    provider = {"name": "vertex", **options(server, **(given or {}))}
    return manager.submit_sync({"data": str(rows), "provider": provider}, **{"model": fake.model, **more})


def last(server):
    return [r for r in server.requests if r.method == "POST" and r.path.endswith("/tuningJobs")][-1]


def test_every_request_is_one_of_the_discovery_documents(manager, fake, server, rows):
    job = submitted(manager, fake, server, rows)
    manager.status_sync(job.id)
    manager.cancel_sync(job.id)
    part = luthier.provider("vertex", **options(server))
    asked(part, lambda: part.find(job.spec, {}))
    known = [(version, FACTS[version]["methods"][m], fact_path(version, m))
             for version in ("v1", "v1beta1") for m in ("create", "get", "list", "cancel")]  # fmt: skip
    for request in server.requests:
        if "tuningJobs" in request.path:
            fitting = [facts for _, facts, path in known
                       if re.fullmatch(path, request.path) and facts["verb"] == request.method]  # fmt: skip
            assert fitting and set(request.query) <= set(fitting[0]["query"]), f"{request.method} {request.path}"
    assert fake.wrong == []


def asked(part, act):
    async def ask():
        try:
            return await act()
        finally:
            await part.close()

    return asyncio.run(ask())


GEMINI = [
    ({}, {}, {}),
    ({"num_train_epochs": 3.0, "adapter": {"name": "lora", "r": 8}}, {"learning_rate_multiplier": 0.5},
     {"epochCount": "3", "adapterSize": "ADAPTER_SIZE_EIGHT", "learningRateMultiplier": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("given", "more", "hyper"), GEMINI, ids=["nothing set", "all set"])
def test_gemini_is_sent_what_was_set_alone(manager, fake, server, rows, given, more, hyper):
    last_only = {"last_checkpoint_only": True} if given else {}
    job = submitted(manager, fake, server, rows, {"suffix": "mine", **more, **last_only}, **given)
    body, token = last(server).json, job.spec.token
    spec = body.pop("supervisedTuningSpec")
    assert body == {"baseModel": fake.model, "tunedModelDisplayName": f"mine-{token}", "labels": {"luthier_job": token}}
    assert spec.pop("trainingDatasetUri") == f"{FOLDER}/rows/{job.spec.files['training'].sha256}.jsonl"
    assert spec == {
        **({"hyperParameters": hyper} if hyper else {}),
        **({"exportLastCheckpointOnly": True} if given else {}),
    }
    assert last(server).path.startswith("/v1/") and fake.wrong == []


def test_an_open_model_is_trained_by_v1beta1_and_gives_its_weights(manager, fake, server, rows, tmp_path):
    job = submitted(manager, fake, server, rows, model=LLAMA, learning_rate=1e-5, global_batch_size=4,
                    adapter={"name": "lora", "r": 16}, num_train_epochs=1.0)  # fmt: skip
    body = last(server).json
    assert last(server).path == f"/v1beta1/{PARENT}/tuningJobs" and fake.wrong == []
    assert body["outputUri"] == f"{FOLDER}/jobs/{job.id}"
    assert body["supervisedTuningSpec"]["tuningMode"] == "TUNING_MODE_PEFT_ADAPTER"
    assert body["supervisedTuningSpec"]["hyperParameters"] == {
        "epochCount": "1", "adapterSize": "ADAPTER_SIZE_SIXTEEN", "learningRate": 1e-5, "batchSize": "4"
    }  # fmt: skip
    assert next(wrong_fields(body, "TuningJob", "v1", asked=True))  # v1 does not know such a job
    fake.set_state(job.remote_id, "JOB_STATE_SUCCEEDED")
    got = manager.download_sync(job.id, tmp_path / "got")
    assert (got.kind, got.adapter_config, set(got.files)) == ("adapter", {"peft_type": "LORA"}, set(ADAPTER))


def test_a_whole_model_is_trained_where_that_is_asked_for(manager, fake, server, rows):
    job = submitted(manager, fake, server, rows, model=LLAMA, adapter="full")
    assert last(server).json["supervisedTuningSpec"]["tuningMode"] == "TUNING_MODE_FULL"
    fake.set_state(job.remote_id, "JOB_STATE_SUCCEEDED")
    part = luthier.provider("vertex", **options(server))
    assert asked(part, lambda: part.artifacts(job.remote_id))[0].kind == "model"


def test_pairs_are_scored_and_their_beta_sent(manager, fake, server, pairs):
    job = submitted(manager, fake, server, pairs, loss={"name": "dpo", "beta": 0.2})
    assert last(server).json["preferenceOptimizationSpec"]["hyperParameters"] == {"beta": 0.2} and fake.wrong == []
    row = fake.rows(job.remote_id)[3]
    assert row["contents"] == [{"role": "user", "parts": [{"text": "3?"}]}]
    assert [(c["score"], c["completion"]["parts"][0]["text"]) for c in row["completions"]] == [(1, "6"), (0, "7")]


def test_a_completed_job_gives_tokens_and_checkpoints_and_names_its_model(manager, fake, server, rows, tmp_path):
    job = submitted(manager, fake, server, rows)
    fake.set_state(job.remote_id, "JOB_STATE_RUNNING")
    assert manager.status_sync(job.id).phase == "waiting for capacity"
    fake.set_state(job.remote_id, "JOB_STATE_SUCCEEDED")
    ended = manager.wait_sync(job.id)
    assert (ended.state, ended.status.result_model) == (JobState.COMPLETED, f"{PARENT}/models/77@1")
    assert manager.metrics_sync(job.id).tokens == 4321
    kinds = [(e.kind, e.metrics.get("step")) for e in manager.events_sync(job.id)]
    assert kinds == [("state", None), ("checkpoint", 5.0)]
    with pytest.raises(ProviderError, match="models/77@1"):
        manager.download_sync(job.id, tmp_path / "got")
    other = submitted(manager, fake, server, rows)
    fake.set_state(other.remote_id, "JOB_STATE_FAILED")
    assert manager.wait_sync(other.id).reason == "line 3 is odd" and fake.wrong == []


def test_a_service_that_ignores_the_filter_is_read_through(manager, fake, server, rows):
    from luthier.testing import Fault

    fake.heeds_filter = False
    for _ in range(3):
        submitted(manager, fake, server, rows)
    server.faults = [Fault(kind="lost", method="POST", path="/tuningJobs$")]
    assert submitted(manager, fake, server, rows).remote_id == f"{PARENT}/tuningJobs/4" and len(fake.jobs()) == 4


def test_validation_rows_have_their_place_and_the_upload_no_token(manager, fake, server, rows):
    submitted(manager, fake, server, rows, **{"data.validation": 0.2})
    spec = last(server).json["supervisedTuningSpec"]
    assert spec["validationDatasetUri"].removeprefix("gs://") in fake.objects
    assert all("authorization" not in r.headers for r in server.requests if r.method == "PUT")


REFUSED = [
    ({"gcs_folder": None}, {}, ("provider.gcs_folder",)),
    ({}, {"learning_rate": 1e-5}, ("learning_rate_multiplier",)),
    ({}, {"adapter": {"name": "lora", "r": 5}}, ("adapter.r", "1", "2", "4")),
    ({}, {"adapter": "full"}, ("adapter.name", "'full'")),
    ({"learning_rate_multiplier": 1.0}, {"model": LLAMA}, ("provider.learning_rate_multiplier",)),
    ({}, {"max_steps": 5}, ("max_steps", "num_train_epochs")),
    ({}, {"loss": "orpo"}, ("loss", "'orpo'")),
]


@pytest.mark.parametrize(("options", "given", "told"), REFUSED, ids=str)
def test_what_the_service_does_not_do_is_refused_before_a_byte_is_sent(
    manager, fake, server, rows, options, given, told
):
    with pytest.raises(LuthierError) as caught:
        submitted(manager, fake, server, rows, options, **given)
    assert all(fact in str(caught.value) for fact in told)
    assert server.requests == []


def test_an_open_model_takes_no_pairs(manager, fake, server, pairs):
    with expect_error("provider-unsupported", "loss", "'dpo'"):
        submitted(manager, fake, server, pairs, model=LLAMA, loss="dpo")
    assert server.requests == []


@pytest.mark.parametrize(("name", "value"), [("suffix", ""), ("suffix", "x" * 118), ("gcs_folder", "bucket/x"),
                                             ("gcs_folder", "gs://b/a#b"), ("access_token", "ya29.x")])  # fmt: skip
def test_options_that_cannot_be_are_refused(name, value):
    with pytest.raises(LuthierError, match=name):
        Vertex(**{name: value})


def test_project_and_location_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p2")
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "europe-west4")
    part = luthier.provider("vertex")
    assert part.scope() == "https://europe-west4-aiplatform.googleapis.com#projects/p2/locations/europe-west4"
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT")
    assert part.scope().endswith("#projects/no project/locations/europe-west4")  # what is offered is told without one
    with pytest.raises(LuthierError, match="GOOGLE_CLOUD_PROJECT"):
        asked(part, part.check)


def test_a_service_accounts_token_is_asked_for_once_and_used(tmp_path, monkeypatch, fake, server):
    import google.auth.jwt
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    claims = []

    def give_token(request):
        told = google.auth.jwt.decode(request.form()["assertion"], certs=public, verify=True)
        claims.append(told)
        return Reply(body={"access_token": "ya29.from-google", "expires_in": 3600, "token_type": "Bearer"})

    issuer = LoopbackServer(give_token)
    account = {"type": "service_account", "project_id": "p1", "private_key_id": "1", "private_key": private.decode(),
               "client_email": "me@p1.iam.gserviceaccount.com", "token_uri": f"{issuer.url}/token"}  # fmt: skip
    (tmp_path / "key.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    part = luthier.provider("vertex", **options(server, access_token=None))

    async def twice():
        await part.check()
        return await part.check()

    with issuer.running():
        assert asked(part, twice) == {"parent": PARENT, "jobs": False}
    assert [claim["scope"] for claim in claims] == ["https://www.googleapis.com/auth/cloud-platform"]
    assert {r.headers["authorization"] for r in server.requests} == {"Bearer ya29.from-google"}
    assert luthier.Secret("ya29.from-google").reveal() not in luthier.ProviderError("auth", "ya29.from-google").line


def test_credentials_that_are_not_there_are_asked_for(tmp_path, monkeypatch, server):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    part = luthier.provider("vertex", **options(server, access_token=None))
    with expect_error("credential-missing", "vertex"):
        asked(part, part.check)


MUTANTS = [
    ({"epochCount": 3.5}, "no string"), ({"epochCount": "3.5"}, "no whole number"), ({"adapterSize": "EIGHT"}, "none of its words"),
    ({"epoch_count": "3"}, "not known"), ({"learningRateMultiplier": True}, "no number"),
]  # fmt: skip


@pytest.mark.parametrize(("hyper", "told"), MUTANTS, ids=str)
def test_the_checker_of_the_fake_finds_what_is_wrong(hyper, told):
    body = {"supervisedTuningSpec": {"hyperParameters": hyper}}
    assert told in next(wrong_fields(body, "TuningJob", "v1", asked=True))
    assert "the service's alone" in next(wrong_fields({"state": "JOB_STATE_RUNNING"}, "TuningJob", "v1", asked=True))


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=4), st.text())
def test_a_conversation_reads_back_as_it_was(turns, system):
    said = [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    messages = [*([{"role": "system", "content": system}] if system else []), *said]
    wire = json.loads(
        json.dumps(gemini_row(luthier.ServiceRow(form="conversation", where="x:1", messages=tuple(messages))))
    )
    back = [{"role": "system", "content": p["text"]} for p in wire.get("systemInstruction", {}).get("parts", [])]
    names = {"user": "user", "model": "assistant"}
    back += [{"role": names[turn["role"]], "content": turn["parts"][0]["text"]} for turn in wire["contents"]]
    assert back == messages
