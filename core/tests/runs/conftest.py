"""Run folders as the engine leaves them, made by hand: no torch, no training."""

import json
import time

import pytest
from luthier.recipe import Recipe, recipe_hash


@pytest.fixture
def make(tmp_path):
    """`make("name", state=..., losses=[...], **recipe)`: a run's folder below `tmp_path/runs`, and its path."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')

    def run(name="one", *, state="completed", losses=(3.0, 2.0, 1.0), number=1, record=None, **settings):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        given = {"model": "demo", "data": str(tmp_path / "rows.jsonl"), "output_dir": str(folder), **settings}
        recipe = Recipe.from_dict(given)
        recipe.write(folder / "recipe.yaml")
        lines = [{"step": i, "loss": loss, "tokens_per_second": 100.0 * i} for i, loss in enumerate(losses, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        held = {
            "run_id": f"20260102-03040{number}-abc{number}",
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - 7200)),
            "recipe_hash": recipe_hash(recipe),
            "seed": recipe.seed,
            "data": "0123456789abcdef",
            "parts": [
                {"kind": "adapter", "name": "full", "distribution": "luthier", "version": "0.1.0"},
                {"kind": "loss", "name": "sft", "distribution": "luthier", "version": "0.1.0"},
                {"kind": "callback", "name": "mine", "distribution": None, "version": None},
            ],
            "note": {"model": {"name_or_path": "some/where/demo"}},
            "versions": {"luthier": "0.1.0", "torch": "2.13.0"},
            "device": "cpu",
            "threads": 2,
            "state": state,
            "step": len(losses),
            "total_steps": 5,
            **(record or {}),
        }
        (folder / "run.json").write_text(json.dumps(held))
        return folder

    return run
