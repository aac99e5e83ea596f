"""Answers in batches: as they would be alone, drawn or not, whatever else is asked at the time."""

from collections import Counter

import pytest
import torch
from luthier.model.generation.answer_batches import Question, SeededDraws, answer_questions
from luthier.model.generation.generate import PromptForm, Sampling, generate_text
from luthier.model.load import load_model, tokenizer_of
from luthier.recipe.schema import Model

PROMPTS = ["1", "How much is 2 and 3?", "a b c", "What is longer than all the others, and by how much?"]


@pytest.fixture(scope="module")
def world(model_folder):
    spec = Model(name_or_path=str(model_folder))
    return load_model(spec, torch.device("cpu"), {}).eval(), tokenizer_of(spec)


def questions(tokenizer, most=6, seed=0):
    return [
        Question(prompt=tokenizer(text)["input_ids"], most=most + i, seed=seed + i) for i, text in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_answer_does_not_depend_on_what_shares_its_batch(world, temperature):
    model, tokenizer = world
    asked = questions(tokenizer)
    together = answer_questions(model, tokenizer, None, asked, max_tokens=10_000, temperature=temperature)
    alone = answer_questions(model, tokenizer, None, asked, max_tokens=1, temperature=temperature)
    turned = answer_questions(model, tokenizer, None, asked[::-1], max_tokens=60, temperature=temperature)
    assert together == alone == turned[::-1]


def test_the_likeliest_answer_is_that_of_generate(world):
    model, tokenizer = world
    asked = [Question(prompt=tokenizer(text)["input_ids"], most=5) for text in PROMPTS]
    found = answer_questions(model, tokenizer, None, asked, max_tokens=10_000)
    assert found == [
        generate_text(model, tokenizer, text, form=PromptForm(chat=False), sampling=Sampling(max_new_tokens=5)).strip()
        for text in PROMPTS
    ]


def test_other_seeds_draw_other_answers(world):
    model, tokenizer = world
    first, second = (
        answer_questions(model, tokenizer, None, questions(tokenizer, seed=s), max_tokens=999, temperature=1.0)
        for s in (0, 100)
    )
    assert first != second


def test_draws_follow_the_softmax_at_the_temperature():
    scores, count = torch.tensor([[1.0, 0.0, -1.0]]), 4000
    draws = SeededDraws(2.0, list(range(count)))
    found = Counter(draws(torch.zeros(count, 1), scores.expand(count, -1)).argmax(-1).tolist())
    expected = (scores[0] / 2).softmax(0).tolist()
    assert [found[i] / count for i in range(3)] == pytest.approx(expected, abs=0.03)
