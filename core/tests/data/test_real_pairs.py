"""Real pairs and verdicts: every row becomes one unit, its sides begin alike, and sharing the prompt saves tokens."""

import json
import re

import numpy as np
import pytest
from luthier.data.batches.shared_prompts import count_saved, share_prompts
from luthier.data.examples import IGNORED
from luthier.data.formats.wanted import Wanted
from luthier.data.prepare import prepare_data
from luthier.data.read.sources import read_source
from luthier.recipe.schema import Data, Source

PAIRED, JUDGED = Wanted(kind="preference"), Wanted(kind="unpaired")


def pandalm():
    """Rows with one prompt and two texts, but for the one whose answer is true, no text."""
    rows = read_source(Source(path="${LUTHIER_DATA}/pandalm/derived_pairs.jsonl"))
    return [
        row.values for row in rows if isinstance(row.values["chosen"], str) and isinstance(row.values["rejected"], str)
    ]


def ifeval():
    return [
        row.values for row in read_source(Source(path="${LUTHIER_DATA}/fireworks_orpo_ifeval/orpo_ifeval.jsonl.gz"))
    ]


def as_message(turn):
    """A turn of Taskmaster-4 as a message, its calls and their answers as JSON text."""
    role = {"agent": "assistant", "user": "user", "api": "user"}[turn["role"]]
    return {"role": role, "content": turn.get("text") or json.dumps(turn.get("api") or turn.get("response"))}


def taskmaster():
    """Rows of a dialogue so far, the agent's next turn, and the verdict of a person."""
    source = Source(path="${LUTHIER_DATA}/taskmaster4/reward_binary.jsonl.gz", max_rows=300)
    return [
        {
            "prompt": [as_message(turn) for turn in row.values["context"]],
            "completion": [as_message(row.values["generation"])],
            "label": bool(row.values["reward"]),
        }
        for row in read_source(source)
    ]


def loosely(text):
    """A text without the blanks around its thought's tags, which are written in one way however they were given."""
    return re.sub(r"\s*(</?think>)\s*", r"\1", text)


SETS = [(pandalm, PAIRED), (ifeval, PAIRED), (taskmaster, JUDGED)]


@pytest.mark.parametrize(("rows", "wanted"), SETS, ids=["pandalm", "ifeval", "taskmaster"])
def test_every_row_is_a_unit_or_a_counted_drop_and_its_sides_share_their_prompt(rows, wanted, shared_data, chat):
    tokenizer, given = chat("chatml"), rows()
    prepared = prepare_data(Data(train=[], max_length=100_000), tokenizer, seed=0, wanted=wanted, given=given)
    units = prepared.train
    assert len(units) + prepared.report.dropped == len(given) and set(prepared.report.drops) <= {"equal_pair"}
    assert np.all(np.diff(units.index) > 0)
    for unit in units:
        for name, side in unit.by_name().items():
            supervised = np.flatnonzero(side.labels != IGNORED)
            stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
            assert side.input_ids[supervised[-1]] == stop and len(supervised) == supervised[-1] - supervised[0] + 1
            if wanted is PAIRED:
                answer = given[unit.index][name]
                text = answer if isinstance(answer, str) else answer["messages"][-1]["content"]
                said = tokenizer.decode(side.input_ids[supervised]).removesuffix("<|im_end|>")
                assert loosely(said) == loosely(text)
    saved = count_saved(units)
    if wanted is PAIRED:
        assert np.all(saved > 0) and prepared.report.shared_tokens == saved.sum()
        assert all(len(share_prompts(unit).heads) == 1 for unit in units.head(20))
    else:
        assert not saved.any() and {unit.columns["label"] for unit in units} == {True, False}
