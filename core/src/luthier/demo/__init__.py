"""The embedded model and data, and the demo: LoRA from first loss to merged artifact, offline, on a CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

HERE: Final = Path(__file__).parent
MODEL: Final = HERE / "model"
RECIPE: Final = HERE / "recipe.yaml"
ANSWER: Final = 32  # tokens of a sample
QUESTION: Final = "Use the tool wolfram. What is the distance between London and Paris?"


@attrs.frozen(kw_only=True)
class DemoResult:
    """What the demo measured, and where what it made lies; `next` are two commands to try."""

    eval_loss_before: float
    eval_loss_after: float
    question: str
    sample_before: str
    sample_after: str
    run: str
    adapter: str
    merged: str
    steps: int
    seconds: float
    next: list[str]

    def to_dict(self) -> dict[str, Any]:
        return attrs.asdict(self)


def run(*, folder: str | Path | None = None, seed: int = 0, quiet: bool = False, **settings: Any) -> DemoResult:
    """Train LoRA on the embedded model, evaluate before and after, merge, and open what was written.

    `folder` is where the run goes (None: runs/demo, or the next free name beside it); `quiet` draws no bar; `settings`
    change the recipe, such as `max_steps`. Raises `LuthierError`.
    """
    from luthier.api import generate, train
    from luthier.builtin.jsonl import FILE, read
    from luthier.runs.run_folder import beside

    began = time.perf_counter()
    before = generate("demo", QUESTION, max_new_tokens=ANSWER, seed=seed)
    watchers = [*([] if quiet else ["progress"]), "jsonl", "plot"]
    target = beside(Path(folder or "runs/demo"))
    with one_thread():
        result = train(RECIPE, output_dir=target, callbacks=watchers, seed=seed, **settings)
    found = [line["eval_loss"] for line in read(result.output_path / FILE) if "eval_loss" in line]
    after = generate(result.merged or result.artifact, QUESTION, max_new_tokens=ANSWER, seed=seed)
    return DemoResult(
        **{"eval_loss_before": found[0], "eval_loss_after": found[-1], "steps": result.steps},
        **{"question": QUESTION, "sample_before": before, "sample_after": after},
        **{"run": str(result.output_path), "adapter": str(result.artifact), "merged": str(result.merged)},
        seconds=time.perf_counter() - began,
        next=[
            f'luthier generate {result.output_path} "{QUESTION}"',
            "luthier train --model demo --data YOUR.jsonl --adapter lora --learning-rate 1e-3",
        ],
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by being shared among threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
