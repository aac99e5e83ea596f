"""The engine `openai_server` against a fake: what it sends, how it repeats, and what its errors say."""

import asyncio
import threading
import time

import pytest
from fake_completions import KEY, FakeCompletions
from luthier import EngineQuestion, LuthierError
from luthier.jobs.clock import use_clock
from luthier.testing import Fault, LoopbackServer, Reply, VirtualClock, expect_error
from luthier_openai import OpenAIServer
from luthier_openai.completions import CompletionsEngine

TEXTS = [f"{i} and {i + 1} are" for i in range(12)]
QUESTIONS = [
    EngineQuestion(
        prompt=tuple(b + 3 for b in text.encode()), text=text, max_tokens=3, seed=2**62 + i, stop_tokens=(2, 7)
    )
    for i, text in enumerate(TEXTS)
]
ANSWERS = [" ".join(text.split()[::-1][:3]) for text in TEXTS]


@pytest.fixture
def fake():
    return FakeCompletions()


def made(server, **options):
    return CompletionsEngine(OpenAIServer(base_url=f"{server.url}/v1", **options))


def answered(engine, questions=QUESTIONS):
    return asyncio.run(engine.answer(questions, lambda count: None))


def test_prompts_are_sent_as_exact_tokens_with_length_stops_and_seed(fake, server):
    assert answered(made(server)) == ANSWERS
    assert sorted(fake.bodies, key=lambda body: body["seed"]) == [
        {
            "model": "mine",
            "prompt": list(question.prompt),
            "max_tokens": 3,
            "temperature": 0.0,
            "seed": question.seed % 2**31,
            "stop_token_ids": [2, 7],
        }
        for question in QUESTIONS
    ]


def test_a_server_that_takes_no_tokens_gets_text_and_openais_fields_alone(fake, server):
    fake.strict = True
    assert answered(made(server, prompt="text", stop_token_ids=False)) == ANSWERS
    assert all(body.keys() == {"model", "prompt", "max_tokens", "temperature", "seed"} for body in fake.bodies)


def test_drawn_answers_have_their_temperature_and_top_p(fake, server):
    drawn = [EngineQuestion(prompt=(100,), max_tokens=2, temperature=0.7)]
    answered(made(server, top_p=0.9), drawn)
    answered(made(server), drawn)
    answered(made(server, top_p=0.9), [EngineQuestion(prompt=(100,), max_tokens=2)])
    assert [(body["temperature"], body.get("top_p")) for body in fake.bodies] == [(0.7, 0.9), (0.7, None), (0.0, None)]


def test_a_prompt_without_an_exact_text_is_refused_before_anything_is_sent(fake, server):
    with expect_error("part-unsupported", "OpenAIServer.prompt, row 1"):
        answered(made(server, prompt="text"), [QUESTIONS[0], EngineQuestion(prompt=(1, 2), max_tokens=3)])
    assert server.requests == []


@pytest.mark.parametrize("kind", ["answer", "lost", "refused"])
def test_a_passing_failure_is_tried_again(fake, server, kind):
    server.faults.append(Fault(kind=kind, path="/v1/completions", times=2, reply=Reply(status=503)))
    with use_clock(VirtualClock()):
        assert answered(made(server)) == ANSWERS


def test_no_more_requests_are_on_their_way_than_allowed(fake):
    running, most, lock = 0, 0, threading.Lock()

    class Slow(LoopbackServer):
        def take(self, request):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            deadline = time.monotonic() + 0.05
            while time.monotonic() < deadline and running < 3:
                pass
            reply = fake.answer(request)
            with lock:
                running -= 1
            return reply, False

    with Slow(fake.answer).running() as server:
        assert answered(made(server, concurrency=3)) == ANSWERS
    assert 1 < most <= 3


def test_the_only_model_of_a_server_is_taken_and_another_one_is_named(fake, server):
    assert asyncio.run(made(server).check()) == f"mine at {server.url}/v1"
    fake.models = ["mine", "yours"]
    assert asyncio.run(made(server, model="yours").check()) == f"yours at {server.url}/v1"
    for model in (None, "theirs"):
        with expect_error("part-unknown", f"OpenAIServer.model, {server.url}/v1") as caught:
            asyncio.run(made(server, model=model).check())
        assert "mine, yours" in caught.value.remedy


def test_a_refused_field_is_told_with_the_address_the_answer_and_a_way_on(fake, server):
    fake.strict = True
    with expect_error("provider-invalid", f"{server.url}/v1: POST /completions", "stop_token_ids", "422") as caught:
        answered(made(server))
    assert "prompt: text" in caught.value.remedy


@pytest.mark.parametrize("body", [{"choices": []}, {"choices": [{"message": {}}]}, {}, ["text"]])
def test_an_answer_without_a_text_is_the_servers_fault(fake, server, body):
    server.faults.append(Fault(kind="answer", path="/v1/completions", times=99, reply=Reply(body=body)))
    with expect_error("provider-protocol", f"{server.url}/v1: POST /completions"):
        answered(made(server), QUESTIONS[:1])


def test_a_server_that_is_not_there_is_named_by_its_address():
    with use_clock(VirtualClock()), pytest.raises(LuthierError) as caught:
        asyncio.run(CompletionsEngine(OpenAIServer(base_url="http://127.0.0.1:9/v1")).check())
    assert caught.value.code == "provider-unreachable"
    assert "http://127.0.0.1:9/v1" in str(caught.value)


def test_a_key_is_sent_and_stands_in_no_error(fake, server, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", KEY)
    fake.key = KEY
    assert answered(made(server, api_key="env:SERVER_KEY")) == ANSWERS
    monkeypatch.setenv("SERVER_KEY", KEY + "-stale")
    with pytest.raises(LuthierError) as caught:
        asyncio.run(made(server, api_key="env:SERVER_KEY").check())
    assert caught.value.code == "provider-auth"
    assert KEY not in f"{caught.value!s} {caught.value!r} {caught.value.remedy}"
    with expect_error("credential-literal", "OpenAIServer.api_key"):
        OpenAIServer(base_url=server.url, api_key=KEY)


def test_a_key_never_goes_out_in_clear_text(monkeypatch):
    monkeypatch.setenv("SERVER_KEY", KEY)
    with expect_error("insecure-url", "OpenAIServer.base_url"):
        asyncio.run(
            CompletionsEngine(OpenAIServer(base_url="http://10.0.0.5:8000/v1", api_key="env:SERVER_KEY")).check()
        )
