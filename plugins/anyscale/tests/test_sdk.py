"""OpenAI's SDK drives the fake, and sends what the provider sends; the public service that is gone is told."""

import openai
import pytest
from luthier import JobState, LuthierError
from luthier.testing import expect_error
from luthier_anyscale import Anyscale


def submitted(manager, fake, server, rows, given=None, **more):
    provider = {"name": "anyscale", "base_url": f"{server.url}/v1", **(given or {})}
    return manager.submit_sync({"data": str(rows), "provider": provider}, **{"model": fake.model, **more})


def last_body(server):
    return [r for r in server.requests if r.method == "POST" and r.path == "/v1/fine_tuning/jobs"][-1].json


@pytest.mark.parametrize("given", [{}, {"num_train_epochs": 2.0, "seed": 3}], ids=str)
def test_the_provider_sends_what_the_sdk_sends_and_nothing_that_was_not_set(manager, fake, server, rows, given):
    job = submitted(manager, fake, server, rows, {"suffix": "mine"}, **given)
    ours = last_body(server)
    hyper = {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}, "seed": 3} if given else {
        "method": {"type": "supervised"}}  # fmt: skip
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0)
    sdk.fine_tuning.jobs.create(model=fake.model, training_file=ours["training_file"], suffix="mine",
                                metadata={"luthier_job": job.id}, **hyper)  # fmt: skip
    assert ours == last_body(server)
    assert server.requests[0].headers["authorization"] == "Bearer k"


def test_a_job_is_followed_to_its_end_and_its_model_named(manager, fake, server, rows, tmp_path):
    job = submitted(manager, fake, server, rows)
    fake.set_state(job.remote_id, "succeeded")
    assert manager.wait_sync(job.id).state == JobState.COMPLETED
    assert manager.progress_sync(job.id).step == 4
    with expect_error("provider-unsupported", job.id):
        manager.download_sync(job.id, tmp_path / "got")


@pytest.mark.parametrize(("given", "told"), [
    ({"loss": "dpo"}, ("loss", "'dpo'")), ({"learning_rate": 1e-5}, ("learning_rate",)), ({"max_steps": 3}, ("num_train_epochs",)),
], ids=str)  # fmt: skip
def test_what_the_service_does_not_do_is_refused_before_a_byte_is_sent(manager, fake, server, rows, given, told):
    with pytest.raises(LuthierError) as caught:
        submitted(manager, fake, server, rows, **given)
    assert all(fact in str(caught.value) for fact in told)
    assert server.requests == []


def test_an_answer_that_would_be_trained_on_against_its_weight_is_refused(manager, fake, server, rows):
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},'
    rows.write_text(line + ' {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}\n')
    with pytest.raises(LuthierError, match="rows.jsonl:1"):
        submitted(manager, fake, server, rows)
    assert server.requests == []


def test_an_address_is_needed_and_that_of_the_public_service_is_told_to_be_gone(manager, fake, server, rows):
    with expect_error("provider-unsupported", "provider.base_url"):
        submitted(manager, fake, server, rows, {"base_url": None})
    with pytest.raises(LuthierError, match="2024-08-01"):
        Anyscale(base_url="https://api.endpoints.anyscale.com/v1")
    with pytest.raises(LuthierError, match="suffix"):
        Anyscale(suffix="x" * 65)
