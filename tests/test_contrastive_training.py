"""InfoNCE trains: queries come to find their passages, alike for every division of the batch, and the model keeps it."""

import json
from pathlib import Path

import luthier
import pytest
import torch
import transformers


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """16 rows of a query, its passage and a hard negative."""
    path = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    words = ["red", "blue", "green", "black", "white", "grey", "pink", "gold"]
    rows = [
        {"query": f"{word} {i}?", "passage": f"{i} {word[::-1]}.", "negative": f"{i} {words[-1 - n]}"}
        for n, word in enumerate(words)
        for i in range(2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def embed(train, texts):
    def run(loss="infonce", **changes):
        return train(data=texts, loss=loss, global_batch_size=16, **{"max_steps": 12, **changes})

    return run


def logged(run):
    return [json.loads(line) for line in (run.output_path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", ["infonce", "infonce_hard"])
def test_queries_come_to_find_their_passages(embed, loss):
    lines = logged(embed({"name": loss, "temperature": 0.1}))
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["found"] > lines[0]["found"] + 0.2


def test_the_division_of_the_batch_changes_nothing(embed):
    whole, divided = (embed(max_steps=3, max_tokens_per_device=n, output_dir=None) for n in (4096, 64))
    assert whole.loss_history == pytest.approx(divided.loss_history, rel=1e-4)


def test_the_saved_model_gives_the_embeddings(embed, texts):
    run = embed({"name": "infonce", "temperature": 0.1}, adapter="full", learning_rate=3e-3, max_steps=30)
    model = transformers.AutoModelForCausalLM.from_pretrained(run.artifact)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.artifact)

    def direction(text):
        ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt").input_ids
        states = model(ids, output_hidden_states=True).hidden_states[-1][0]
        return torch.nn.functional.normalize(states.mean(0).detach(), dim=-1)

    rows = [json.loads(line) for line in Path(texts).read_text().splitlines()]
    queries, passages = (torch.stack([direction(row[name]) for row in rows]) for name in ("query", "passage"))
    nearest = (queries @ passages.T).argmax(-1)
    assert (nearest == torch.arange(len(rows))).float().mean() > 0.8


def test_a_row_without_its_negative_is_refused_by_name(train, tmp_path):
    path = tmp_path / "bare.jsonl"
    path.write_text(json.dumps({"query": "1?", "passage": "1."}) + "\n")
    with pytest.raises(luthier.LuthierError, match="negative"):
        train(data=str(path), loss="infonce_hard", max_steps=1)
