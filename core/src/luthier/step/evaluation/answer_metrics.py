"""Metrics over answers: held-out prompts are answered greedily, and each answer is scored beside its reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import torch

from luthier.data.examples import IGNORED, TokenDataset
from luthier.errors import LuthierError
from luthier.model.attention import generating_attention
from luthier.model.generation.generate import stop_token_ids
from luthier.model.generation.generation_inputs import prepare_generation
from luthier.randomness import keep_randomness

if TYPE_CHECKING:
    from luthier.step.setup import Setup

ROOM: Final = 32  # tokens by which an answer may be longer than its reference


def measure_answers(setup: Setup, dataset: TokenDataset) -> dict[str, list[float]]:
    """Return the [sum, count] of each metric over answers, of the first `max_eval_answers` rows that are one document.

    The ranks share the rows. An answer ends at a stop token, or once it is much longer than its reference.
    """
    metrics = {name: metric for name, metric in setup.metrics.items() if metric.record.over == "answers"}
    if not metrics:
        return {}
    sums = {name: [0.0, 0.0] for name in metrics}
    for i, (prompt, reference) in enumerate(_questions(dataset, setup.recipe.max_eval_answers)):
        if i % setup.world.size != setup.world.rank:
            continue
        answer, wanted = _answer(setup, prompt, len(reference) + ROOM), _decode(setup.tokenizer, reference)
        for name, metric in metrics.items():
            total, count = metric.score("score_answer", answer, wanted)
            sums[name] = [sums[name][0] + total, sums[name][1] + count]
    gathered = setup.world.gather(sums) if setup.world.size > 1 else [sums]
    found = {name: [sum(of_rank[name][j] for of_rank in gathered) for j in (0, 1)] for name in metrics}
    if not any(count for _, count in found.values()):
        raise LuthierError("data-empty", "no held-out row has a prompt and an answer to compare with",
                           where="data.validation", remedy="Leave metrics over answers out.")  # fmt: skip
    return found


def _questions(dataset: TokenDataset, most: int) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens before the first supervised one, and the supervised ones up to the next that is not."""
    given = 0
    for i in range(len(dataset)):
        example = dataset[i]
        supervised = (example.labels != IGNORED).tolist()
        if len(example.starts) > 1 or not any(supervised[1:]) or supervised[0]:
            continue
        first = supervised.index(True)
        last = supervised.index(False, first) if False in supervised[first:] else len(supervised)
        yield example.input_ids[:first].tolist(), example.input_ids[first:last].tolist()
        given += 1
        if given == most:
            return


def _answer(setup: Setup, prompt: list[int], most: int) -> str:
    model = setup.model
    with generating_attention(model), keep_randomness():
        inputs = prepare_generation(model, setup.adapter, torch.tensor([prompt], device=model.device))
        stops = stop_token_ids(model, setup.tokenizer) or None
        told: dict[str, Any] = {"max_new_tokens": most, "do_sample": False, "eos_token_id": stops}
        whole = model.generate(**inputs, **told, pad_token_id=setup.tokenizer.pad_token_id or 0)
    known = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return _decode(setup.tokenizer, whole[0, known:].tolist())


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
