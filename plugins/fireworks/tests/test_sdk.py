"""Fireworks' own SDK drives the fake through a whole job, and sends what the provider sends."""

import asyncio
import json

import fireworks
import pytest
from fireworks.types import dpo_job_create_params, supervised_fine_tuning_job_create_params
from luthier import JobState, LuthierError

GIVEN = {"num_train_epochs": 3.0, "learning_rate": 2e-5, "warmup_steps": 5, "global_batch_size": 8,
         "optimizer": {"name": "adamw", "weight_decay": 0.1}, "data.max_length": 512, "adapter": {"name": "lora", "r": 4}}  # fmt: skip
ASKED = {"epochs": 3, "learning_rate": 2e-5, "learning_rate_warmup_steps": 5, "batch_size_samples": 8,
         "optimizer_weight_decay": 0.1, "max_context_length": 512, "lora_rank": 4}  # fmt: skip


@pytest.fixture
def sdk(server):
    return fireworks.Fireworks(base_url=server.url, api_key="k", account_id="me", max_retries=0)


def submitted(manager, fake, server, rows, options=None, **more):
    provider = {"name": "fireworks", "base_url": server.url, "account": "me", **(options or {})}
    return manager.submit_sync({"data": str(rows), "provider": provider}, **{"model": fake.model, **more})


def last(server, path):
    return [r for r in server.requests if r.method == "POST" and r.path.endswith(path)][-1]


def test_the_sdk_completes_a_job_at_the_fake(sdk, fake, rows):
    sdk.datasets.create(dataset_id="d", dataset={"user_uploaded": {}, "example_count": "12"})
    sdk.datasets.upload("d", file=rows.open("rb"))
    assert sdk.datasets.get("d").state == "READY"
    names = []
    for number in range(3):
        made = sdk.supervised_fine_tuning_jobs.create(
            dataset="accounts/me/datasets/d", base_model=fake.model, supervised_fine_tuning_job_id=f"j{number}"
        )
        names.append(made.name)
    assert sorted(j.name for j in sdk.supervised_fine_tuning_jobs.list()) == names  # two pages
    sdk.supervised_fine_tuning_jobs.cancel("j0", body={})
    assert sdk.supervised_fine_tuning_jobs.get("j0").state == "JOB_STATE_CANCELLING"
    dpo = sdk.dpo_jobs.create(
        dataset="accounts/me/datasets/d", training_config={"base_model": fake.model}, dpo_job_id="p"
    )
    assert sdk.dpo_jobs.get_metrics_file_endpoint("p").signed_url.startswith(fake.url)
    assert dpo.state == "JOB_STATE_CREATING"
    assert set(sdk.models.get_download_endpoint("m").filename_to_signed_urls) >= {"adapter_config.json"}


@pytest.mark.parametrize("given", [{}, GIVEN], ids=["nothing set", "all set"])
def test_the_provider_sends_what_the_sdk_sends_and_nothing_that_was_not_set(manager, sdk, fake, server, rows, given):
    options = {"suffix": "mine", "early_stop": False, "checkpoint_steps": 50} if given else {}
    job = submitted(manager, fake, server, rows, options, **given)
    ours = last(server, "/supervisedFineTuningJobs")
    asked = dict(ASKED, output_model=f"accounts/me/models/mine-{job.spec.token}", early_stop=False,
                 sampler_checkpoint_save_interval_steps=50) if given else {}  # fmt: skip
    sdk.supervised_fine_tuning_jobs.create(
        dataset=ours.json["dataset"], base_model=fake.model, supervised_fine_tuning_job_id="theirs", **asked
    )
    theirs = last(server, "/supervisedFineTuningJobs")
    assert ours.json == theirs.json
    assert ours.query == {"supervisedFineTuningJobId": [f"luthier-{job.spec.token}"]}
    assert theirs.query.keys() == ours.query.keys()
    known = supervised_fine_tuning_job_create_params.SupervisedFineTuningJobCreateParams.__annotations__
    assert len(ours.json) <= len(known)


@pytest.mark.parametrize(("loss", "wire"), [
    ({"name": "dpo", "beta": 0.2}, {"method": "DPO", "dpo": {"beta": 0.2}}), ("dpo", {"method": "DPO"}),
    ("orpo", {"method": "ORPO"}),
], ids=str)  # fmt: skip
def test_a_preference_job_is_the_sdks_and_always_names_its_loss(manager, sdk, fake, server, pairs, loss, wire):
    job = submitted(manager, fake, server, pairs, loss=loss, num_train_epochs=2.0)
    ours = last(server, "/dpoJobs")
    sdk.dpo_jobs.create(dataset=ours.json["dataset"], dpo_job_id="theirs", loss_config=wire,
                        training_config={"base_model": fake.model, "epochs": 2})  # fmt: skip
    assert ours.json == last(server, "/dpoJobs").json
    assert set(ours.json) <= {"dataset", "trainingConfig", "lossConfig"}
    assert dpo_job_create_params.DpoJobCreateParams.__annotations__.keys() >= {
        "dataset",
        "training_config",
        "loss_config",
    }
    row = fake.rows(job.remote_id)[3]
    assert row["preferred_output"] == [{"role": "assistant", "content": "6"}]
    assert [e.metrics["step"] for e in manager.events_sync(job.id) if e.kind == "metrics"] == [1.0, 2.0, 3.0, 4.0]


def test_the_dataset_that_arrives_is_the_one_that_the_sdk_would_send(manager, sdk, fake, server, rows):
    job = submitted(manager, fake, server, rows)
    ours = last(server, "/datasets").json
    sdk.datasets.create(dataset_id="theirs", dataset={"user_uploaded": {}, "example_count": "12"})
    assert {**ours, "datasetId": "theirs"} == last(server, "/datasets").json
    form = last(server, ":upload").form()
    with job.spec.files["training"].path.open("rb") as file:
        sdk.datasets.upload("theirs", file=file)
    assert form["file"] == last(server, ":upload").form()["file"]
    assert fake.rows(job.remote_id) == [json.loads(line) for line in rows.read_text().splitlines()]


def test_validation_rows_go_to_a_dataset_of_their_own(manager, fake, server, rows, tmp_path):
    other = tmp_path / "held.jsonl"
    other.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    submitted(manager, fake, server, rows, {"early_stop": True}, **{"data.validation": [str(other)]})
    body = last(server, "/supervisedFineTuningJobs").json
    assert body["evaluationDataset"] != body["dataset"] and body["evaluationDataset"] in fake.datasets
    assert body["earlyStop"] is True


def test_a_large_file_goes_to_a_signed_link(manager, fake, server, rows, monkeypatch):
    from luthier_fireworks import datasets

    monkeypatch.setattr(datasets, "FORM_BYTES", 10)
    job = submitted(manager, fake, server, rows)
    (put,) = [r for r in server.requests if r.method == "PUT"]
    assert "authorization" not in put.headers and len(fake.rows(job.remote_id)) == 12
    assert last(server, ":getUploadEndpoint").json == {"filenameToSize": {"training.jsonl": str(len(put.body))}}
    assert server.count("POST", ":validateUpload$") == 1


def test_a_dataset_that_was_never_filled_is_filled(manager, fake, server, rows):
    from luthier.testing import Fault

    server.faults = [Fault(kind="answer", method="POST", path=":upload$", times=99)]
    with pytest.raises(LuthierError):
        manager.submit_sync({"model": fake.model, "data": str(rows)}, provider=_provider(server))
    assert [d["state"] for d in fake.datasets.values()] == ["UPLOADING"]
    server.faults = []
    assert len(fake.rows(submitted(manager, fake, server, rows).remote_id)) == 12


def _provider(server):
    return {"name": "fireworks", "base_url": server.url, "account": "me"}


def test_a_job_gives_its_adapter_its_losses_and_its_cost(manager, fake, server, rows, tmp_path):
    job = submitted(manager, fake, server, rows, num_train_epochs=2.0)
    assert manager.progress_sync(job.id).epoch == 1.0
    fake.set_state(job.remote_id, "JOB_STATE_COMPLETED")
    ended = manager.wait_sync(job.id)
    assert (ended.state, ended.status.result_model) == (
        JobState.COMPLETED,
        f"accounts/me/models/luthier-{job.spec.token}",
    )
    metrics, progress = manager.metrics_sync(job.id), manager.progress_sync(job.id)
    assert (metrics.train_loss, metrics.cost, metrics.currency) == (1.0, 2.5, "USD")
    assert (progress.step, progress.total_epochs, progress.learning_rate) == (4, 2.0, 1e-5)
    got = manager.download_sync(job.id, tmp_path / "got")
    assert (got.kind, got.base_model, got.adapter_config["peft_type"]) == ("adapter", fake.model, "LORA")
    assert sorted(got.files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert list(manager.download_sync(job.id, tmp_path / "m", kind="metrics").files) == ["metrics.jsonl"]


def test_a_file_that_leaves_the_folder_is_refused(manager, fake, server, rows, tmp_path, monkeypatch):
    import fake_fireworks

    job = submitted(manager, fake, server, rows)
    fake.set_state(job.remote_id, "JOB_STATE_COMPLETED")
    monkeypatch.setattr(fake_fireworks, "ADAPTER", {"../evil": b"x"})
    with pytest.raises(LuthierError) as caught:
        manager.download_sync(job.id, tmp_path / "got" / "in")
    assert caught.value.code == "archive-unsafe" and not (tmp_path / "got" / "evil").exists()


def test_a_metrics_file_in_another_form_is_passed_over(manager, fake, server, rows, monkeypatch):
    import fake_fireworks

    monkeypatch.setattr(
        fake_fireworks, "METRICS", "step,loss\n1,2\n" + '{"step": 3, "loss": "0.5"}\n[1]\n{"loss": NaN}\n'
    )
    job = submitted(manager, fake, server, rows)
    found = [e.metrics for e in manager.events_sync(job.id) if e.kind == "metrics"]
    assert found == [{"step": 3.0, "loss": 0.5}, {"loss": None}]


def test_why_a_job_failed_is_told(manager, fake, server, rows):
    job = submitted(manager, fake, server, rows)
    fake.set_state(job.remote_id, "JOB_STATE_FAILED")
    assert manager.wait_sync(job.id).reason == "INVALID_ARGUMENT: line 3 is odd"


def test_both_kinds_of_jobs_are_listed(manager, fake, server, rows, pairs):
    import luthier

    ids = {submitted(manager, fake, server, rows).remote_id for _ in range(3)}
    ids.add(submitted(manager, fake, server, pairs, loss="dpo").remote_id)
    part = luthier.provider("fireworks", api_key="k", base_url=server.url, account="me")
    assert {j.remote_id for j in asyncio.run(part.list(10))} == ids


REFUSED = [
    ({"model": "meta-llama/Llama-3.1-8B"}, {}, ("accounts/fireworks/models/Llama-3.1-8B",)),
    ({"warmup_ratio": 0.1}, {}, ("warmup_ratio", "warmup_steps")),
    ({"adapter": {"name": "lora", "lora_alpha": 8}}, {}, ("adapter.lora_alpha", "adapter.r")),
    ({"adapter": "full"}, {}, ("adapter.name", "'full'")),
    ({"num_train_epochs": 1.5}, {}, ("num_train_epochs",)),
    ({}, {"early_stop": True}, ("provider.early_stop",)),
    ({"loss": {"name": "sft", "label_smoothing": 0.1}}, {}, ("loss.label_smoothing",)),
    ({"data.train_on": ["assistant", "tool"]}, {}, ("data.train_on",)),
]


@pytest.mark.parametrize(("given", "options", "told"), REFUSED, ids=str)
def test_what_the_service_does_not_do_is_refused_before_a_byte_is_sent(
    manager, fake, server, rows, given, options, told
):
    with pytest.raises(LuthierError) as caught:
        submitted(manager, fake, server, rows, options, **given)
    assert all(fact in str(caught.value) for fact in told)
    assert server.requests == []


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_beta_is_above_0_and_below_a_half(manager, fake, server, pairs, beta):
    with pytest.raises(LuthierError, match="loss.beta"):
        submitted(manager, fake, server, pairs, loss={"name": "dpo", "beta": beta})
    with pytest.raises(LuthierError, match="validation"):
        submitted(manager, fake, server, pairs, loss="dpo", **{"data.validation": 0.2})
    assert server.requests == []


@pytest.mark.parametrize("suffix", ["", "Big", "1a", "a" * 53, "a-"])
def test_a_suffix_that_is_no_id_is_refused(suffix):
    from luthier_fireworks import Fireworks

    with pytest.raises(LuthierError, match="suffix"):
        Fireworks(suffix=suffix)


def test_the_account_is_part_of_the_scope_and_asked_for(monkeypatch):
    import luthier

    part = luthier.provider("fireworks", api_key="k")
    monkeypatch.setenv("FIREWORKS_ACCOUNT_ID", "mine")
    assert part.scope() == "https://api.fireworks.ai#mine"
    monkeypatch.delenv("FIREWORKS_ACCOUNT_ID")
    assert part.scope() == "https://api.fireworks.ai#no account"  # what is offered is told without one
    with pytest.raises(LuthierError, match="FIREWORKS_ACCOUNT_ID"):
        asyncio.run(part.check())
