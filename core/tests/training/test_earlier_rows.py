"""Tasks that follow from each other: learning rates that fall, and rows of the earlier tasks that come again."""

import json

import hypothesis.strategies as st
import luthier
import numpy as np
import pytest
from hypothesis import given, settings
from luthier.data.examples import TokenDataset, TokenExample
from luthier.errors import LuthierError
from luthier.model.load import tokenizer_of
from luthier.recipe.objects import Objects
from luthier.training.continual.earlier_rows import add_earlier
from luthier.training.continual.start import plan_sequence
from luthier.training.continual.tasks import make_tasks, place_of, read_sequence, relate_tasks
from luthier.training.rows import prepared_data


def dataset(count, first):
    ids = [np.array([first + i], np.int32) for i in range(count)]
    return TokenDataset.of([TokenExample(input_ids=t, labels=t, index=i) for i, t in enumerate(ids)])


@settings(max_examples=30, deadline=None)
@given(own=st.integers(1, 30), before=st.lists(st.integers(1, 30), min_size=1, max_size=4), share=st.floats(0, 3))
def test_a_share_of_the_earlier_rows_comes_once_each_as_many_of_every_task(own, before, share):
    earlier = [dataset(count, 100 * (number + 1)) for number, count in enumerate(before)]
    joined = add_earlier(dataset(own, 0), earlier, share, seed=7)
    tokens = joined.input_ids.tolist()
    assert tokens[:own] == list(range(own)) and len(set(tokens)) == len(tokens)
    assert len(set(joined.index.tolist())) == len(tokens)  # no two rows are taken for one
    counts = [sum(token // 100 == number + 1 for token in tokens) for number in range(len(before))]
    equal = round(share * own) / len(before)
    assert all(count == size or abs(count - equal) < 1 for count, size in zip(counts, before, strict=True))
    assert abs(len(tokens) - own - share * own) <= 1 or any(
        count == size for count, size in zip(counts, before, strict=True)
    )


def related(tmp_path, **own):
    """Return two related tasks over files with a held-out share, and the prepared rows of each."""
    files = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"prompt": f"{name} {i}?", "completion": str(i)} for i in range(20)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append({"name": name, "data": {"train": [str(path)], "validation": 0.25}})
    source = {"model": "demo", "learning_rate": 1e-2, "tasks": files, **own}
    tree, base, sequence, rest = read_sequence(source, {}, {})
    tasks = relate_tasks(make_tasks(tree, base, sequence.tasks, rest), sequence)
    tokenizer = tokenizer_of(tasks[0].recipe.model)
    from luthier.data.formats.wanted import TOKENS

    return tasks, [
        prepared_data(task.recipe, Objects(task=place_of(tasks, number)), tokenizer, TOKENS)
        for number, task in enumerate(tasks)
    ]


def texts(dataset):
    return {tuple(dataset[i].input_ids.tolist()) for i in range(len(dataset))}


def test_a_later_task_trains_on_rows_of_the_earlier_one_and_on_none_that_either_holds_out(tmp_path):
    _, (first, second) = related(tmp_path, replay_share=0.4)
    assert (len(first.train), len(second.train)) == (15, 15 + 6)
    assert len(texts(second.train) & texts(first.train)) == 6
    assert not texts(second.train) & (texts(first.validation) | texts(second.validation))


def test_the_rate_falls_from_task_to_task_but_for_a_tasks_own(tmp_path):
    tasks, _ = related(tmp_path, learning_rate_decay=0.5)
    assert [task.recipe.learning_rate for task in tasks] == [1e-2, 5e-3]
    rows = tmp_path / "first.jsonl"
    given = {"model": "demo", "data": {"train": [str(rows)], "validation": 0.25}, "num_runs": 2, "max_steps": 1,
             "learning_rate": 1e-2, "learning_rate_decay": 0.5}  # fmt: skip
    plan = plan_sequence(given, {}, {}, tmp_path / "out")
    assert [task.peak_learning_rate for task in plan.tasks] == [1e-2, 5e-3]
    with pytest.raises(LuthierError) as refused:
        luthier.continual(given, learning_rate="auto", output_dir=tmp_path / "out", dry_run=True)
    assert (refused.value.code, refused.value.where) == ("recipe-conflict", "learning_rate_decay")


def test_a_finished_sequence_is_not_taken_for_one_with_another_share_of_earlier_rows(recipe_file):
    own = {"max_steps": 1, "adapter": "lora", "eval_base": False}
    first = luthier.continual(recipe_file, **own, replay_share=0.5)
    assert luthier.continual(recipe_file, **own, replay_share=0.5).metrics == first.metrics
    with pytest.raises(LuthierError) as refused:
        luthier.continual(recipe_file, **own)
    assert refused.value.code == "data-changed"


def test_rows_of_a_stream_cannot_come_again_which_is_said_before_the_first_task(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    tasks = [{"name": name, "data": {"train": [str(rows)], "streaming": True}} for name in ("one", "two")]
    source = {"model": "demo", "max_steps": 1, "tasks": tasks, "replay_share": 0.5}
    tree, base, sequence, rest = read_sequence(source, {}, {})
    made = make_tasks(tree, base, sequence.tasks, rest)
    with pytest.raises(LuthierError) as refused:
        relate_tasks(made, sequence)
    assert (refused.value.code, refused.value.where) == ("recipe-conflict", "replay_share")
