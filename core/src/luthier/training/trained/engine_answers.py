"""Answers of an engine, a program that has the model loaded, to held-out prompts; no weights are read here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from luthier.data.examples import TokenDataset
from luthier.data.formats.wanted import Wanted
from luthier.distributed.world import World
from luthier.errors import LuthierError
from luthier.jobs.sync_twins import run_plainly
from luthier.model import load
from luthier.model.generation.answer_batches import Question
from luthier.plugins.contracts.side_protocols import Engine
from luthier.plugins.contracts.values import EngineQuestion
from luthier.plugins.registry import installed_plugins
from luthier.recipe import Recipe
from luthier.recipe.objects import Objects
from luthier.recipe.parts import find_part, resolve_parts
from luthier.step.evaluation.answer_metrics import AnswerWay, list_tasks, measure_tasks, over_answers
from luthier.step.evaluation.built_metric import BuiltMetric
from luthier.step.evaluation.metric_parts import build_metrics
from luthier.step.evaluation.scores import Scores
from luthier.step.preparation import show_progress
from luthier.training.rows import made_rows


@attrs.frozen(kw_only=True, eq=False)
class EngineScores:
    """The scores of an engine's answers by metric. `engine` says in words what answered, for how many `rows`."""

    engine: str
    rows: int
    scores: dict[str, Scores]
    directions: dict[str, bool | None]  # True if higher is better


def measure_engine(recipe: Recipe, chosen: Any, *, separate: bool, most: int | None) -> EngineScores:
    """Return the recipe's metrics over the answers of an engine: a name, `{name: ..., options}`, or an object.

    The rows are the recipe's own where they are `separate` from those that the run was trained on, else its validation
    rows. An answer has at most `most` tokens (None: 32 beyond its reference).
    """
    metrics = _answer_metrics(recipe)
    engine = _find_engine(chosen)
    description = run_plainly(engine.check())
    tokenizer = load.tokenizer_of(recipe.model)
    wanted = Wanted.of_part(resolve_parts(recipe).loss)
    prepared = made_rows(recipe, Objects(), tokenizer, wanted, World())
    rows = prepared.train if separate else prepared.validation
    assert isinstance(rows, TokenDataset)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stops = tuple(sorted({*prepared.stop_tokens, *end}))

    def answer(questions: Sequence[Question], temperature: float) -> list[str]:
        return _ask_engine(engine, [_posed(tokenizer, question, temperature, stops) for question in questions])

    way = AnswerWay(answer=answer, tokenizer=tokenizer, seed=recipe.seed, most=most)
    scores = measure_tasks(way, metrics, list_tasks(rows, recipe.max_eval_answers))
    directions = {name: metric.record.greater_is_better for name, metric in metrics.items()}
    return EngineScores(engine=description, rows=len(rows), scores=scores, directions=directions)


def _answer_metrics(recipe: Recipe) -> dict[str, BuiltMetric]:
    metrics = over_answers(build_metrics(resolve_parts(recipe)))
    if not metrics:
        raise LuthierError("recipe-missing", "an engine gives answers, and no metric is about answers",
                           where="--engine", remedy="Name one, such as --metric exact_match.")  # fmt: skip
    return metrics


def _find_engine(chosen: Any) -> Engine:
    part = find_part(chosen, "engine", "--engine", installed_plugins())
    engine: Engine = installed_plugins().build(part.offer, part.options) if part.offer else part.local
    return engine


def _posed(tokenizer: Any, question: Question, temperature: float, stops: tuple[int, ...]) -> EngineQuestion:
    return EngineQuestion(
        prompt=tuple(question.prompt),
        text=exact_text(tokenizer, question.prompt),
        max_tokens=question.most,
        temperature=temperature,
        seed=question.seed,
        stop_tokens=stops,
    )


def exact_text(tokenizer: Any, ids: Sequence[int]) -> str | None:
    """Return the text that this tokenizer, called as a server calls it, makes exactly these tokens of; None if none.

    A tokenizer that adds a first token by itself must not find it in the text, too.
    """
    whole = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    begin = tokenizer.bos_token or ""
    candidates = [whole, *([whole.removeprefix(begin)] if begin and whole.startswith(begin) else [])]
    return next((text for text in candidates if list(tokenizer(text)["input_ids"]) == list(ids)), None)


def _ask_engine(engine: Engine, questions: Sequence[EngineQuestion]) -> list[str]:
    answers = list(run_plainly(engine.answer(questions, show_progress(len(questions), "answers"))))
    if len(answers) != len(questions) or not all(isinstance(answer, str) for answer in answers):
        raise LuthierError("part-invalid", "an engine gives one text for each question", where="--engine",
                           found=f"{len(answers)} answers to {len(questions)} questions")  # fmt: skip
    return [answer.strip() for answer in answers]
