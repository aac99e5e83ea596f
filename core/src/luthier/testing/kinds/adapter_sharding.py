"""The check that an adapter trains on two ranks, each with a shard of every weight, as it does on one."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.testing.laws import Subject, law, not_run
from luthier.testing.strategies import bases_of

STEPS: Final = 3
ROUNDING: Final = 1e-4  # relative: three steps sum float32 in another order
FLAGS: Final = ("tolerance", "mergeable", "artifact", "save_dtype", "needs", "provides", "conflicts")


@law(0)
def trains_alike_on_two_sharded_ranks(subject: Subject) -> None:
    """Three steps on two ranks, each with a shard of every weight, have the losses of one rank with whole weights.

    The options are the defaults, or the author's first example if the defaults do not suit the tiny model. Options
    whose name has "dropout" are set to 0. A part that refuses sharding by an error such as `part-unsupported` passes.
    """
    import torch

    from luthier.testing.ranks import in_ranks
    from luthier.testing.worlds import save_tiny_model

    if sys.platform != "linux" or torch.cuda.is_initialized():
        not_run("ranks are forked, on Linux and before CUDA is used")
    with tempfile.TemporaryDirectory() as name:
        settings = {"model": str(save_tiny_model(Path(name) / "model")), "data": _rows(), "max_steps": STEPS}
        options, alone = _train_alone(subject, {**settings, "output_dir": f"{name}/alone"})
        spread = {**settings, "output_dir": f"{name}/sharded", "distributed": {"strategy": "fsdp"}}
        for rank, answer in enumerate(in_ranks(2, lambda: _train(subject, options, spread))):
            if "refused" not in answer:
                _compare(alone["losses"], answer["losses"], rank)


def _train_alone(subject: Subject, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the first options that are not refused, and the losses of a run with them."""
    refused = "no options are given"
    for given in bases_of(subject.options_class, subject.own_examples):
        names = [field.name for field in attrs.fields(type(given)) if "dropout" in field.name]
        options = attrs.evolve(given, **{name: 0.0 for name in names if isinstance(getattr(given, name), float | None)})
        answer = _train(subject, options, settings)
        if "refused" not in answer:
            return options, answer
        refused = answer["refused"]
    return not_run(f"its options were refused: {refused}")


def _train(subject: Subject, options: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the losses of a run, or how it was refused."""
    import luthier
    from luthier.testing.running import DEFECTS

    part = subject.build(options)
    for flag in FLAGS:  # an object from Python has the record's flags as its own attributes
        if not hasattr(part, flag):
            setattr(part, flag, getattr(subject.record, flag))
    try:
        run = luthier.train(**settings, adapter=part, precision="float32", num_threads=1, exact_callbacks=[],
                            memory_check=False, global_batch_size=4, optimizer="sgd", learning_rate=0.1)  # fmt: skip
    except luthier.LuthierError as error:
        if error.code in DEFECTS:
            raise
        return {"refused": error.line}
    return {"losses": list(run.loss_history)}


def _rows() -> list[dict[str, str]]:
    return [{"prompt": f"{i} and {i}?", "completion": f"{i + i}" * (1 + i % 3)} for i in range(12)]


def _compare(alone: list[float], sharded: list[float], rank: int) -> None:
    off = max(abs(a - b) / max(abs(a), 1e-6) for a, b in zip(alone, sharded, strict=True))
    assert off <= ROUNDING, f"losses of rank {rank} of two are {sharded}, those of one rank {alone}"
