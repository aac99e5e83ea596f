"""Engines: an evaluation's prompts are answered elsewhere, by the exact tokens, and as the weights here would answer."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import kept_answers
import luthier
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.testing import expect_error
from luthier.testing.worlds import save_tiny_model, tiny_tokenizer
from luthier.training.trained.engine_answers import exact_text
from transformers import AutoModelForCausalLM, AutoTokenizer

KEEPING = {"name": "custom", "function": "kept_answers:keep_answer"}


class Elsewhere:
    """An engine in Python: transformers' own generation, one prompt at a time, from the folder of a merged model."""

    def __init__(self, folder, lose=0):
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        self.lose, self.questions = lose, []

    async def check(self):
        return "transformers in this process"

    async def answer(self, questions, advance):
        self.questions += questions
        advance(len(questions))
        return [self.say(question) for question in questions[self.lose :]]

    def say(self, question):
        ids = torch.tensor([question.prompt])
        made = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=question.max_tokens,
                                   do_sample=False, eos_token_id=list(question.stop_tokens), pad_token_id=0)  # fmt: skip
        return self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def kept(*args, **settings):
    """The evaluation, and each answer beside its reference."""
    kept_answers.KEPT.clear()
    evaluation = luthier.evaluate(*args, metrics=[KEEPING], **settings)
    return evaluation, list(kept_answers.KEPT)


@pytest.fixture(scope="module")
def run(model_folder, data_file, tmp_path_factory):
    """A run whose model has learned to end its answers, and its merged model in `merged`."""
    folder = tmp_path_factory.mktemp("engines") / "run"
    how = {"num_train_epochs": 8, "global_batch_size": 8, "learning_rate": 1e-2, "exact_callbacks": []}
    run = luthier.train(model=str(model_folder), data=str(data_file), output_dir=folder, adapter="lora", **how)
    luthier.merge(run.output_path, folder / "merged")
    return run


def test_an_engine_gives_the_numbers_and_answers_of_the_weights_here(run, data_file):
    engine = Elsewhere(run.output_path / "merged")
    evaluation, theirs = kept(run.output_path, data_file, engine=engine, max_answers=10)
    here, ours = kept(run.output_path, data_file, max_answers=10)
    assert theirs == ours
    assert len({answer for answer, _ in ours}) > 1
    assert evaluation.metrics == {"eval_custom": here.metrics["eval_custom"]}
    assert (evaluation.engine, evaluation.rows, here.engine) == ("transformers in this process", 24, None)
    assert all(AutoTokenizer.from_pretrained(run.output_path / "merged")(q.text).input_ids == list(q.prompt)
               for q in engine.questions)  # fmt: skip


def test_a_run_keeps_what_answered(run, data_file):
    luthier.evaluate(run.output_path, data_file, metrics=[KEEPING], engine=Elsewhere(run.output_path / "merged"),
                     max_answers=2)  # fmt: skip
    lines = (run.output_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["engine"] == "transformers in this process"


def test_no_weights_are_read_for_an_engine(run, data_file, tmp_path):
    folder = save_tiny_model(tmp_path / "weightless")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    engine = Elsewhere(run.output_path / "merged")
    assert luthier.evaluate(folder, data_file, metrics=[KEEPING], engine=engine, max_answers=2).rows == 24


@pytest.mark.parametrize(
    ("settings", "code", "place"),
    [
        ({"metrics": []}, "recipe-missing", "--engine"),
        ({"against": "demo"}, "recipe-conflict", "--against"),
        ({"tasks": ["luthier_sums"]}, "recipe-conflict", "--tasks"),
        ({"device": "cpu"}, "recipe-conflict", "--device"),
        ({"engine": "no_such_engine"}, "part-unknown", "--engine"),
        ({"engine": object()}, "part-invalid", "--engine: builtins.object"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(run, data_file, settings, code, place):
    given = {"metrics": [KEEPING], "engine": Elsewhere(run.output_path / "merged"), **settings}
    with expect_error(code, place):
        luthier.evaluate(run.output_path, data_file, **given)


def test_an_engine_that_loses_an_answer_is_told_so(run, data_file):
    with expect_error("part-invalid", "--engine", "23", "24"):
        luthier.evaluate(run.output_path, data_file, metrics=[KEEPING], engine=Elsewhere(run.output_path / "merged", 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 319), min_size=1, max_size=12))
def test_a_text_for_an_engine_gives_exactly_its_tokens_or_there_is_none(ids):
    tokenizer = tiny_tokenizer()
    text = exact_text(tokenizer, ids)
    assert text is None or tokenizer(text)["input_ids"] == ids


def test_the_text_leaves_out_what_the_tokenizer_adds():
    tokenizer = tiny_tokenizer()
    with_bos = tokenizer("2 and 3?")["input_ids"]
    assert with_bos[0] == tokenizer.bos_token_id
    assert exact_text(tokenizer, with_bos) == "2 and 3?"
    assert exact_text(tokenizer, with_bos[1:]) is None


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def server(run):
    """transformers' own server with the merged model, at an address of this machine."""
    folder, port = str(run.output_path / "merged"), free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--port", str(port),
               "--host", "127.0.0.1", "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})  # fmt: skip
    address, end = f"http://127.0.0.1:{port}/v1", time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"{address}/models", timeout=5).read()
            break
        except OSError:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < end, "the server does not begin"
            select_wait()
    yield address
    process.terminate()
    process.wait()


def select_wait():
    """Let half a second pass for the server's start."""
    with socket.socket() as nothing:
        nothing.bind(("127.0.0.1", 0))
        nothing.listen()
        nothing.settimeout(0.5)
        try:
            nothing.accept()
        except TimeoutError:
            return


@pytest.mark.slow
def test_a_real_server_gives_the_answers_of_the_weights_here(run, data_file, server):
    options = {"name": "openai_server", "base_url": server, "prompt": "text", "stop_token_ids": False}
    evaluation, theirs = kept(run.output_path, data_file, engine=options)
    here, ours = kept(run.output_path, data_file)
    assert theirs == ours
    assert evaluation.metrics["eval_custom"] == here.metrics["eval_custom"]
    assert evaluation.engine == f"{run.output_path / 'merged'} at {server}"
