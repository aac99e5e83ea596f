"""boto3 drives the fake through a whole job, and sends what the provider sends; every signature is computed twice."""

import asyncio
import json
from urllib.parse import quote

import boto3
import luthier
import pytest
from botocore.exceptions import ClientError
from fake_bedrock import CSV, FOLDER, MODEL, ROLE
from hypothesis import given
from hypothesis import strategies as st
from luthier import JobState, LuthierError, ProviderError
from luthier.testing import expect_error
from luthier_bedrock import Bedrock
from luthier_bedrock.offer import conversation_row, hyper_parameters

SECRET, TOKEN = "secret-of-the-tests/+=", "token-of-a-session=="


@pytest.fixture
def keys(fake):
    fake.secret, fake.token = SECRET, TOKEN
    return {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN,
            "AWS_REGION": "us-east-1"}  # fmt: skip


@pytest.fixture
def sdk(server, manager):
    return boto3.client("bedrock", endpoint_url=server.url, region_name="us-east-1")


def options(server, **more):
    return {
        "name": "bedrock",
        "base_url": server.url,
        "s3_url": server.url,
        "role_arn": ROLE,
        "s3_folder": FOLDER,
        **more,
    }


def submitted(manager, fake, server, rows, given=None, **more):
    provider = options(server, **(given or {}))
    return manager.submit_sync({"data": str(rows), "provider": provider}, **{"model": fake.model, **more})


def last_body(server):
    return [r for r in server.requests if r.method == "POST" and r.path == "/model-customization-jobs"][-1].json


def test_the_sdk_completes_a_job_at_the_fake(sdk, fake):
    fake.objects["my-bucket/luthier/rows/x.jsonl"] = b"{}"
    asked = {"roleArn": ROLE, "baseModelIdentifier": MODEL, "trainingDataConfig": {"s3Uri": f"{FOLDER}/rows/x.jsonl"},
             "outputDataConfig": {"s3Uri": f"{FOLDER}/out/"}}  # fmt: skip
    arns = [
        sdk.create_model_customization_job(jobName=f"j{n}", customModelName=f"m{n}", **asked)["jobArn"]
        for n in range(3)
    ]
    found = sdk.get_paginator("list_model_customization_jobs").paginate()
    assert [j["jobArn"] for page in found for j in page["modelCustomizationJobSummaries"]] == arns[::-1]  # two pages
    fake.set_state("j0", "Completed")
    assert sdk.get_model_customization_job(jobIdentifier=arns[0])["outputModelArn"].endswith("abcdefghijkl")
    sdk.stop_model_customization_job(jobIdentifier=arns[1])
    assert sdk.get_model_customization_job(jobIdentifier="j1")["status"] == "Stopping"
    with pytest.raises(ClientError, match="ConflictException"):
        sdk.stop_model_customization_job(jobIdentifier="j0")


@pytest.mark.parametrize("given", [{}, {"num_train_epochs": 3.0, "learning_rate": 2e-5, "warmup_steps": 5}], ids=str)
def test_the_provider_sends_what_the_sdk_sends_and_nothing_that_was_not_set(manager, sdk, fake, server, rows, given):
    job = submitted(manager, fake, server, rows, {"suffix": "mine"}, **given)
    ours = last_body(server)
    assert ours.get("hyperParameters") == (
        {"epochCount": "3", "learningRate": "2e-05", "learningRateWarmupSteps": "5"} if given else None
    )
    assert (ours["customModelName"], ours["jobName"]) == (f"mine-{job.spec.token}", f"luthier-{job.spec.token}")
    sdk.create_model_customization_job(**ours)
    assert ours == last_body(server) and fake.wrong == []
    assert len(fake.jobs()) == 1  # the same token makes no second job, of whoever asks


@pytest.mark.parametrize("change", [{"secret": "another"}, {"token": "another"}, {"region": "eu-west-1"}], ids=str)
def test_a_request_that_is_signed_otherwise_is_refused(manager, fake, server, rows, change):
    for name, value in change.items():
        setattr(fake, name, value)
    with pytest.raises(ProviderError) as caught:
        submitted(manager, fake, server, rows)
    assert caught.value.kind == "permission" and fake.jobs() == []
    part = luthier.provider("bedrock", **{k: v for k, v in options(server).items() if k != "name"})
    with pytest.raises(ProviderError, match="InvalidSignatureException"):
        asked(part, part.check)


def asked(part, act):
    async def ask():
        try:
            return await act()
        finally:
            await part.close()

    return asyncio.run(ask())


def test_a_job_is_read_and_stopped_by_its_arn_too(manager, sdk, fake, server, rows):
    job = submitted(manager, fake, server, rows)
    arn = fake.tunes[job.remote_id]["jobArn"]
    part = luthier.provider("bedrock", **{k: v for k, v in options(server).items() if k != "name"})
    assert asked(part, lambda: part.status(arn)).remote_id == job.remote_id
    asked(part, lambda: part.cancel(arn))
    assert [r.raw_path for r in server.requests][-2:] == [
        f"/model-customization-jobs/{quote(arn, safe='')}", f"/model-customization-jobs/{quote(arn, safe='')}/stop"
    ]  # fmt: skip
    sdk.get_model_customization_job(jobIdentifier=arn)
    assert server.requests[-1].raw_path == server.requests[-3].raw_path  # boto3 writes the path as we do


def test_no_key_goes_to_s3_and_the_rows_arrive_whole(manager, fake, server, rows):
    job = submitted(manager, fake, server, rows)
    (put,) = [r for r in server.requests if r.method == "PUT"]
    assert "authorization" not in put.headers and put.first("X-Amz-Security-Token") == TOKEN
    row = {"schemaVersion": "bedrock-conversation-2024", "messages": [
        {"role": "user", "content": [{"text": "3?"}]}, {"role": "assistant", "content": [{"text": "6"}]}]}  # fmt: skip
    assert fake.rows(job.remote_id)[3] == row
    assert put.path == f"/my-bucket/luthier/rows/{job.spec.files['training'].sha256}.jsonl"


def test_validation_rows_and_a_system_text_have_their_places(manager, fake, server, tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b")]
    line = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
    path.write_text("\n".join(line.replace('"a"', f'"{n}"') for n in range(10)) + "\n")
    job = submitted(manager, fake, server, path, **{"data.validation": 0.2})
    (validator,) = last_body(server)["validationDataConfig"]["validators"]
    assert validator["s3Uri"] != last_body(server)["trainingDataConfig"]["s3Uri"]
    assert len(fake.rows(job.remote_id)) == 8 and fake.rows(job.remote_id)[0]["system"] == [{"text": "Be brief."}]


def test_a_completed_job_gives_its_losses_and_names_its_model(manager, fake, server, rows, tmp_path):
    job = submitted(manager, fake, server, rows)
    assert (job.state, manager.metrics_sync(job.id).train_loss) == (JobState.PENDING, None)
    fake.set_state(job.remote_id, "InProgress")
    assert (manager.status_sync(job.id).state, manager.status_sync(job.id).phase) == (JobState.RUNNING, "training")
    fake.set_state(job.remote_id, "Completed")
    ended = manager.wait_sync(job.id)
    assert (ended.state, ended.reason) == (JobState.COMPLETED, None)  # though the answer has a failureMessage
    metrics, progress = manager.metrics_sync(job.id), manager.progress_sync(job.id)
    assert (metrics.train_loss, metrics.eval_loss, progress.step, progress.loss) == (1.0, 1.5, 4, 1.0)
    with pytest.raises(ProviderError, match="custom-model/amazon.nova-micro"):
        manager.download_sync(job.id, tmp_path / "got")
    got = manager.download_sync(job.id, tmp_path / "metrics", kind="metrics")
    assert (got.path / "step_wise_training_metrics.csv").read_text() == CSV
    states = [e.message for e in manager.events_sync(job.id) if e.kind == "state"]
    assert states == ["validating: Completed", "training: InProgress"]


def test_why_a_job_failed_is_told(manager, fake, server, rows):
    job = submitted(manager, fake, server, rows)
    fake.set_state(job.remote_id, "Failed")
    assert manager.wait_sync(job.id).reason == "Failure Message"


REFUSED = [
    ({"role_arn": None}, {}, ("provider.role_arn",)),
    ({"s3_folder": None}, {}, ("provider.s3_folder",)),
    ({"learning_rate_multiplier": 0.5}, {}, ("provider.learning_rate_multiplier",)),
    ({}, {"num_train_epochs": 6.0}, ("1 to 5",)),
    ({}, {"learning_rate": 1.0}, ("1e-06 to 0.0001",)),
    ({}, {"warmup_ratio": 0.1}, ("warmup_ratio", "warmup_steps")),
    ({}, {"loss": "dpo"}, ("loss", "'dpo'")),
    ({}, {"adapter": {"name": "lora", "r": 8}}, ("adapter.r",)),
    ({}, {"model": "meta.llama3-1-8b-instruct-v1:0:128k", "global_batch_size": 2}, ("1 to 1",)),
    (
        {},
        {"model": "anthropic.claude-3-haiku-20240307-v1:0:200k", "learning_rate": 1e-5},
        ("learning_rate_multiplier",),
    ),
]


@pytest.mark.parametrize(("options", "given", "told"), REFUSED, ids=str)
def test_what_the_service_does_not_do_is_refused_before_a_byte_is_sent(
    manager, fake, server, rows, options, given, told
):
    with pytest.raises(LuthierError) as caught:
        submitted(manager, fake, server, rows, options, **given)
    assert all(fact in str(caught.value) for fact in told)
    assert server.requests == []


@pytest.mark.parametrize("text", ["Assistant: hi", "see [EOS]", "<image>"])
def test_a_mark_of_the_services_own_is_refused_with_its_line(manager, fake, server, rows, text):
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([lines[0], lines[1].replace("1?", text), *lines[2:]]) + "\n")
    with expect_error("data-row", "rows.jsonl:2"):
        submitted(manager, fake, server, rows)
    assert server.requests == []


def test_claude_takes_a_multiplier(manager, fake, server, rows):
    submitted(
        manager,
        fake,
        server,
        rows,
        {"learning_rate_multiplier": 0.5},
        model="anthropic.claude-3-haiku-20240307-v1:0:200k",
    )
    assert last_body(server)["hyperParameters"] == {"learningRateMultiplier": "0.5"} and fake.wrong == []


@pytest.mark.parametrize(("name", "value"), [("suffix", "a--b"), ("suffix", "x" * 53), ("suffix", ""), ("s3_folder", "bucket"),
                                             ("role_arn", "me"), ("secret_access_key", "abc"), ("session_token", "abc")])  # fmt: skip
def test_options_that_cannot_be_are_refused(name, value):
    with pytest.raises(LuthierError, match=name):
        Bedrock(**{name: value})


def test_a_profile_names_keys_and_region(tmp_path, monkeypatch, fake, server):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    lines = f"[profile tuner]\nregion = us-east-1\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = {SECRET}\n"
    (tmp_path / "config").write_text(lines)
    fake.secret, fake.token = SECRET, None
    part = luthier.provider("bedrock", base_url=server.url, profile="tuner")
    assert asked(part, part.check) == {"region": "us-east-1", "jobs": False}
    assert luthier.provider("bedrock", profile="tuner").scope() == "https://bedrock.us-east-1.amazonaws.com#tuner"
    for wrong, told in (
        ({"profile": "nobody"}, "nobody"),
        ({}, "AWS_REGION"),
        ({"region": "us-east-1"}, "aws configure"),
    ):
        other = luthier.provider("bedrock", base_url=server.url, **wrong)
        with pytest.raises(LuthierError, match=told):
            asked(other, other.check)


@given(st.dictionaries(st.sampled_from(["num_train_epochs", "global_batch_size", "warmup_steps"]), st.integers(1, 500)),
       st.floats(1e-9, 1.0))  # fmt: skip
def test_every_hyper_parameter_is_a_text_that_reads_back_as_it_was(numbers, rate):
    sent = hyper_parameters({**{k: float(v) for k, v in numbers.items()}, "learning_rate": rate}, None)
    assert all(isinstance(text, str) for text in sent.values()) and float(sent["learningRate"]) == rate
    assert sorted(int(v) for k, v in sent.items() if k != "learningRate") == sorted(numbers.values())


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=4), st.text())
def test_a_conversation_reads_back_as_it_was(turns, system):
    messages = [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    messages = [*([{"role": "system", "content": system}] if system else []), *messages]
    row = luthier.ServiceRow(form="conversation", where="x:1", messages=tuple(messages))
    wire = json.loads(json.dumps(conversation_row(row)))
    back = [{"role": "system", "content": part["text"]} for part in wire.get("system", [])]
    back += [{"role": turn["role"], "content": turn["content"][0]["text"]} for turn in wire["messages"]]
    assert back == messages
