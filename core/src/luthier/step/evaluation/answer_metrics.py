"""Metrics over answers: held-out prompts are answered in batches, and each answer is scored beside its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

from luthier.data.examples import IGNORED, TokenDataset
from luthier.errors import LuthierError
from luthier.model.generation.answer_batches import Question, answer_questions
from luthier.randomness import number_of
from luthier.step.evaluation.scores import Scores

if TYPE_CHECKING:
    from luthier.step.evaluation.built_metric import BuiltMetric
    from luthier.step.setup import Setup

ROOM: Final = 32  # tokens by which an answer may exceed its reference, if no length is given


@attrs.frozen(kw_only=True, eq=False)
class AnswerWay:
    """How answers are had: `answer(questions, temperature)`, of at most `most` tokens, drawn by the run's `seed`."""

    answer: Callable[[Sequence[Question], float], Sequence[str]]
    tokenizer: Any
    seed: int
    most: int | None  # None: until an answer is much longer than its reference


@attrs.frozen(kw_only=True)
class Task:
    """A held-out row: its number, its prompt, and the answer that it has."""

    number: int
    prompt: list[int]
    reference: list[int]


def measure_answers(setup: Setup, dataset: TokenDataset, most: int | None = None) -> dict[str, Scores]:
    """Return the scores of each metric over answers, of the first `max_eval_answers` rows that are one document.

    The ranks share the rows. An answer ends at a stop token, or after `most` tokens (None: once it is much longer
    than its reference).
    """
    metrics = over_answers(setup.metrics)
    if not metrics:
        return {}
    own = list_tasks(dataset, setup.recipe.max_eval_answers)[setup.world.rank :: setup.world.size]

    def answer(questions: Sequence[Question], temperature: float) -> list[str]:
        return answer_questions(setup.model, setup.tokenizer, setup.adapter, questions,
                                max_tokens=setup.packing.max_tokens, temperature=temperature)  # fmt: skip

    way = AnswerWay(answer=answer, tokenizer=setup.tokenizer, seed=setup.recipe.seed, most=most)
    answers = _score_tasks(way, metrics, own)
    return _join_scores(metrics, setup.world.gather(answers) if setup.world.size > 1 else [answers])


def measure_tasks(way: AnswerWay, metrics: Mapping[str, BuiltMetric], tasks: list[Task]) -> dict[str, Scores]:
    """Return the scores of each metric over answers that are had in this way."""
    return _join_scores(metrics, [_score_tasks(way, metrics, tasks)])


def over_answers(metrics: Mapping[str, BuiltMetric]) -> dict[str, BuiltMetric]:
    """Return those of the metrics that are about answers."""
    return {name: metric for name, metric in metrics.items() if metric.record.over == "answers"}


def list_tasks(dataset: TokenDataset, most: int) -> list[Task]:
    """Return the first `most` rows that have a prompt and an answer; `data-empty` if there are none."""
    tasks = list(_tasks(dataset, most))
    if not tasks:
        raise LuthierError("data-empty", "no held-out row has a prompt and an answer to compare with",
                           where="data.validation", remedy="Leave metrics over answers out.")  # fmt: skip
    return tasks


def _join_scores(
    metrics: Mapping[str, BuiltMetric], of_ranks: Sequence[Mapping[str, dict[int, tuple[float, ...]]]]
) -> dict[str, Scores]:
    return {name: _scores(name, metric, [of_rank[name] for of_rank in of_ranks]) for name, metric in metrics.items()}


def _score_tasks(
    way: AnswerWay, metrics: Mapping[str, BuiltMetric], tasks: list[Task]
) -> dict[str, dict[int, tuple[float, ...]]]:
    """Return what each task adds to each metric; those that want the same answers share them."""
    answers: dict[tuple[int, float], list[list[str]]] = {}
    references = [_decode(way.tokenizer, task.reference) for task in tasks]
    scores = {}
    for name, metric in metrics.items():
        asked = (metric.part.num_answers, metric.part.temperature)
        if asked not in answers:
            answers[asked] = _answer(way, tasks, *asked)
        rows = zip(tasks, answers[asked], references, strict=True)
        scores[name] = {task.number: metric.score_answers(given, reference) for task, given, reference in rows}
    return scores


def _answer(way: AnswerWay, tasks: list[Task], count: int, temperature: float) -> list[list[str]]:
    """Return `count` answers to each task; a drawn one follows from the run's seed, the row and its number alone."""
    questions = [
        Question(
            prompt=task.prompt,
            most=way.most or len(task.reference) + ROOM,
            seed=number_of("answer", way.seed, task.number, draw) % 2**63,
        )
        for task in tasks
        for draw in range(count)
    ]
    flat = way.answer(questions, temperature)
    return [list(flat[i * count : (i + 1) * count]) for i in range(len(tasks))]


def _scores(name: str, metric: BuiltMetric, of_ranks: list[dict[int, tuple[float, ...]]]) -> Scores:
    by_number = {number: row for rows in of_ranks for number, row in rows.items()}
    if len({len(row) for row in by_number.values()}) > 1:
        problem = "score_answers returns as many statistics for every answer"
        raise LuthierError("part-invalid", problem, where=f"metric {name}", found=sorted(map(len, by_number.values())))
    rows = np.array([by_number[number] for number in sorted(by_number)], np.float64)
    return Scores(rows=rows, conclude=metric.part.conclude)


def _tasks(dataset: TokenDataset, most: int) -> Iterator[Task]:
    """Yield the tokens before the first supervised one, and the supervised ones up to the next that is not."""
    given = 0
    for i in range(len(dataset)):
        example = dataset[i]
        supervised = (example.labels != IGNORED).tolist()
        if len(example.starts) > 1 or not any(supervised[1:]) or supervised[0]:
            continue
        first = supervised.index(True)
        last = supervised.index(False, first) if False in supervised[first:] else len(supervised)
        ids = example.input_ids
        yield Task(number=i, prompt=ids[:first].tolist(), reference=ids[first:last].tolist())
        given += 1
        if given == most:
            return


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
