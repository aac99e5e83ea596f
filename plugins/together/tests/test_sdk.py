"""Together's own SDK drives the fake through a whole job, and sends what the provider sends."""

import json
import os

import pytest
import together
from luthier import JobState
from luthier.testing import expect_error

BY_THE_SDK = {  # what the SDK adds of its own, reviewed 2026-11-28: defaults of its signature, which nobody set
    "n_epochs", "n_evals", "n_checkpoints", "batch_size", "packing", "warmup_ratio", "max_grad_norm", "weight_decay",
    "learning_rate", "lr_scheduler", "validation_file", "early_stopping_enabled", "training_type",
}  # fmt: skip


@pytest.fixture
def sdk(server):
    return together.Together(base_url=server.url, api_key="k", max_retries=0)


def test_the_sdk_completes_a_job_at_the_fake(sdk, fake, rows, tmp_path):
    file = sdk.files.upload(file=str(rows), purpose="fine-tune", check=False)
    job = sdk.fine_tuning.create(training_file=file.id, model=fake.model, n_epochs=2, lora=True, suffix="s")
    assert job.status == "pending"
    fake.set_state(job.id, "completed")
    assert sdk.fine_tuning.retrieve(job.id).status == "completed"
    assert [j.id for j in sdk.fine_tuning.list().data] == [job.id]
    assert [e.type for e in sdk.fine_tuning.list_events(job.id).data][1] == "training_start"
    assert sdk.fine_tuning.list_metrics(job.id).metrics[0]["train/loss"] == 4.0
    assert sdk.fine_tuning.list_checkpoints(job.id).data[0].step == 2
    with sdk.fine_tuning.with_streaming_response.content(ft_id=job.id, checkpoint="adapter") as content:
        assert len(b"".join(content.iter_bytes())) > 100
    other = sdk.fine_tuning.create(training_file=file.id, model=fake.model, lora=True)
    assert sdk.fine_tuning.cancel(other.id).status == "cancelled"


def submitted(manager, fake, server, rows, **more):
    provider = {"name": "together", "base_url": server.url}
    return manager.submit_sync({"model": fake.model, "data": str(rows), "provider": provider, **more})


def last_body(server, path="/v1/fine-tunes"):
    return [r for r in server.requests if r.method == "POST" and r.path == path][-1].json


@pytest.mark.parametrize("given", [
    {}, {"num_train_epochs": 3.0}, {"adapter": {"name": "lora", "r": 8, "lora_alpha": 16}}, {"learning_rate": 2e-5},
    {"global_batch_size": 16}, {"warmup_ratio": 0.1}, {"lr_scheduler_type": "cosine"},
], ids=str)  # fmt: skip
def test_the_provider_sends_what_the_sdk_sends_and_nothing_that_was_not_set(manager, sdk, fake, server, rows, given):
    job = submitted(manager, fake, server, rows, **given)
    ours = last_body(server)
    names = {"num_train_epochs": "n_epochs", "learning_rate": "learning_rate", "global_batch_size": "batch_size",
             "warmup_ratio": "warmup_ratio", "lr_scheduler_type": "lr_scheduler_type"}  # fmt: skip
    asked = {names[k]: int(v) if k == "num_train_epochs" else v for k, v in given.items() if k in names}
    lora = {"lora": True, "lora_r": 8, "lora_alpha": 16} if "adapter" in given else {}
    sdk.fine_tuning.create(
        training_file=ours["training_file"], model=fake.model, suffix=job.spec.token, **asked, **lora
    )
    theirs = last_body(server)
    if "lr_scheduler" in ours:  # the SDK adds the arguments' defaults
        assert theirs["lr_scheduler"].pop("lr_scheduler_args")
    if "training_type" in ours:  # and those of LoRA
        assert [theirs["training_type"].pop(n) for n in ("lora_dropout", "lora_trainable_modules")] == [
            0.0,
            "all-linear",
        ]
    assert {k: v for k, v in theirs.items() if k in ours} == ours
    assert theirs.keys() - ours.keys() <= BY_THE_SDK
    together.lib.types.fine_tuning.FinetuneRequest(**{**theirs, **ours})  # the SDK requires its own defaults


def test_the_file_that_arrives_is_the_one_that_the_sdk_would_send(manager, sdk, fake, server, rows):
    job = submitted(manager, fake, server, rows)
    ours = [r for r in server.requests if r.path == "/v1/files"][-1].form()
    sdk.files.upload(file=str(job.spec.files["training"].path), purpose="fine-tune", check=False)
    theirs = [r for r in server.requests if r.path == "/v1/files"][-1].form()
    assert {k: v for k, v in ours.items() if k != "file_name"} == {k: v for k, v in theirs.items() if k != "file_name"}
    assert fake.rows(job.remote_id) == [json.loads(line) for line in rows.read_text().splitlines()]


def test_a_job_gives_its_adapter_its_losses_and_its_cost(manager, fake, server, rows, tmp_path):
    job = submitted(manager, fake, server, rows, adapter={"name": "lora", "r": 8})
    fake.set_state(job.remote_id, "completed")
    ended = manager.wait_sync(job.id)
    assert (ended.state, ended.status.result_model.endswith(job.spec.token)) == (JobState.COMPLETED, True)
    metrics, progress = manager.metrics_sync(job.id), manager.progress_sync(job.id)
    assert (metrics.train_loss, metrics.cost, metrics.currency) == (1.0, 2.5, "USD")
    assert (progress.step, progress.total_steps, progress.loss) == (4, 4, 1.0)
    got = manager.download_sync(job.id, tmp_path / "got")
    assert (got.kind, got.adapter_config["peft_type"]) == ("adapter", "LORA")
    assert sorted(got.files) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_price_above_the_limit_is_refused_by_the_services_own_word_before_a_job_is_made(manager, fake, server, rows):
    from luthier import LuthierError

    (manager.store.folder / "prices.json").write_text(
        json.dumps({"together": [{"model": "*", "amount": 0.01, "date": "2026-11-28"}]})
    )
    with pytest.raises(LuthierError, match="2.5 USD") as caught:
        manager.submit_sync({"model": fake.model, "data": str(rows)}, max_cost=1.0, provider=provider(server))
    assert caught.value.code == "cost-above"
    assert fake.jobs() == []


def provider(server):
    return {"name": "together", "base_url": server.url}


def test_the_project_is_part_of_the_scope(monkeypatch, server):
    import luthier

    part = luthier.provider("together", api_key="k", base_url=f"{server.url}/v1")
    assert part.scope() == server.url
    monkeypatch.setitem(os.environ, "TOGETHER_PROJECT_ID", "p1")
    assert part.scope() == f"{server.url}#p1"


def test_a_file_above_one_put_is_refused_before_it_is_sent(manager, fake, server, rows, monkeypatch):
    from luthier_together import offer

    monkeypatch.setattr(offer, "PUT_BYTES", 100)
    with expect_error("data-row", "training.jsonl", "100"):
        submitted(manager, fake, server, rows)
    assert server.requests == []
