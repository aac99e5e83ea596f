"""Penalties of trained weights on two sharded ranks: losses and norms are those of one process."""

import json

import luthier
import pytest
from luthier.testing.ranks import in_ranks
from luthier.testing.worlds import save_tiny_model

PENALTIES = ("l1", "l2", "l2_start", "ternary_distance", "kl")


def numbers(settings):
    """Every loss, penalty and gradient norm of the run, in order."""
    run = luthier.train(**settings)
    lines = [json.loads(line) for line in (run.output_path / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in ("loss", "penalty", "grad_norm") if name in line]


@pytest.mark.parametrize(
    "names",
    [("l1", "l2_start"), *(pytest.param((name,), marks=pytest.mark.slow) for name in PENALTIES)],
    ids="+".join,
)
def test_two_sharded_ranks_are_pulled_as_one_process_is(names, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} and {i + 1} " * (1 + i % 3)}) + "\n" for i in range(12)))
    settings = {
        "model": str(save_tiny_model(tmp_path / "model")), "data": str(rows), "adapter": "full",
        "penalties": [{"name": name, "weight": 0.05} for name in names], "exact_callbacks": ["jsonl"],
        "global_batch_size": 4, "max_tokens_per_device": 64, "max_steps": 3, "logging_steps": 1,
        "learning_rate": 1e-2, "num_threads": 1, "precision": "float32",
    }  # fmt: skip
    alone = numbers({**settings, "output_dir": str(tmp_path / "alone")})
    free = numbers({**settings, "penalties": [], "output_dir": str(tmp_path / "free")})
    assert alone[-1] != pytest.approx(free[-1], rel=1e-4)
    sharded = {**settings, "distributed": {"strategy": "fsdp"}, "output_dir": str(tmp_path / "sharded")}
    first, second = in_ranks(2, numbers, sharded)
    assert first == pytest.approx(alone, rel=1e-4)
    assert second == first
