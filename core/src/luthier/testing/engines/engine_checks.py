"""Checks of engines: each question is answered in its place, whatever else is asked, and progress is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import attrs

from luthier.jobs.sync_twins import run_plainly
from luthier.plugins.contracts.values import EngineQuestion
from luthier.testing.laws import Subject, law

TEXTS: Final = ("What is 2 and 3?", "Name a colour.", "a", "The cat sat on", "What is 7 and 4?")


@law(1, default_only=True, needs_torch=False)
def says_what_answers(subject: Subject, options: Any) -> None:
    """`check` returns one line of text, which is shown beside the numbers."""
    description = run_plainly(subject.build(options).check())
    assert isinstance(description, str), f"not a text: {description!r}"
    assert description.strip(), "an empty text"
    assert "\n" not in description, f"more than one line: {description!r}"


@law(1, default_only=True, needs_torch=False)
def answers_in_the_order_of_the_questions(subject: Subject, options: Any) -> None:
    """The answer to a question is the same alone, among others and in another order, if the likeliest tokens are taken.

    There is one text for each question, and none for no question.
    """
    engine = subject.build(options)
    together, _ = _answers(engine, QUESTIONS)
    assert len(together) == len(QUESTIONS), f"{len(together)} answers to {len(QUESTIONS)} questions"
    assert all(isinstance(answer, str) for answer in together), f"not texts: {together}"
    backwards, _ = _answers(engine, QUESTIONS[::-1])
    assert backwards[::-1] == together, f"{together}, and in another order {backwards[::-1]}"
    alone = [_answers(subject.build(options), [question])[0] for question in QUESTIONS]
    assert alone == [[answer] for answer in together], f"{together}, and each alone {alone}"
    assert _answers(engine, [])[0] == [], "answers to no question"


@law(1, default_only=True, needs_torch=False)
def tells_its_progress(subject: Subject, options: Any) -> None:
    """`advance` is called for as many questions as there are."""
    _, told = _answers(subject.build(options), QUESTIONS)
    assert all(isinstance(count, int) and count > 0 for count in told), f"advance was called with {told}"
    assert sum(told) == len(QUESTIONS), f"{sum(told)} of {len(QUESTIONS)} questions were told"


@law(1, default_only=True, needs_torch=False)
def reads_the_prompts(subject: Subject, options: Any) -> None:
    """Of five different prompts not all have the same answer."""
    answers, _ = _answers(subject.build(options), QUESTIONS)
    assert len(set(answers)) > 1, f"each prompt is answered by {answers[0]!r}"


@law(1, default_only=True, needs_torch=False)
def keeps_to_the_length(subject: Subject, options: Any) -> None:
    """An answer of at most 1 token is nowhere longer than one of 16, and somewhere shorter."""
    engine = subject.build(options)
    short, long = (_answers(engine, [attrs.evolve(q, max_tokens=n) for q in QUESTIONS])[0] for n in (1, 16))
    sizes = [(len(one), len(other)) for one, other in zip(short, long, strict=True)]
    assert all(one <= other for one, other in sizes), f"characters of answers of 1 and of 16 tokens: {sizes}"
    assert any(one < other for one, other in sizes), f"characters of answers of 1 and of 16 tokens: {sizes}"


def live(subject: Subject, options: Any) -> None:
    """Check the engine, and have likeliest and drawn answers with these options."""
    engine = subject.build(options)
    run_plainly(engine.check())
    _answers(engine, QUESTIONS)
    _answers(engine, [attrs.evolve(question, temperature=0.7) for question in QUESTIONS])


def _question(text: str) -> EngineQuestion:
    """Return a question whose tokens are the bytes of the text, 3 for the first."""
    return EngineQuestion(prompt=tuple(byte + 3 for byte in text.encode()), text=text, max_tokens=12, stop_tokens=(2,))


def _answers(engine: Any, questions: Sequence[EngineQuestion]) -> tuple[list[str], list[int]]:
    """Return the answers, and how many questions each call of `advance` told of."""
    told: list[int] = []
    answers = run_plainly(engine.answer(questions, told.append))
    return list(answers), told


QUESTIONS: Final = tuple(_question(text) for text in TEXTS)
