"""Methods side by side, for the parts that are installed: memory, trained share, speed, held-out loss."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

from tests.speed.sides import Side, median
from tests.speed.table import Row
from tests.speed.worker import Gate

WARM, ROUNDS = 3, 8
ROWS, HELD_OUT = 2048, 64
BLOCKS = 128  # rows of one length
METHODS: dict[str, dict[str, Any]] = {  # each beside `full`, with the learning rate that suits it
    "full": {"adapter": "full", "learning_rate": 3e-4},
    "full, checkpointed": {"adapter": "full", "learning_rate": 3e-4, "gradient_checkpointing": True},
    "lora": {"adapter": "lora", "learning_rate": 3e-3},
    "lora, checkpointed": {"adapter": "lora", "learning_rate": 3e-3, "gradient_checkpointing": True},
    "dora": {"adapter": "dora", "learning_rate": 3e-3},
    "lora on int8": {"adapter": "lora", "learning_rate": 3e-3, "quantizer": "int8"},
    "qlora": {"adapter": "lora", "learning_rate": 3e-3, "quantizer": "nf4"},
    "ternary": {"adapter": "full", "learning_rate": 1e-3, "quantizer": "ternary"},
}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocabulary", type=int, default=8192)


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    for name in (name for name, method in METHODS.items() if _is_installed(method)):
        own, base = _pair(name, arguments)
        more = {"memory_mib": own["whole_peak"] / 2**20, "trained_share": own["share"], "held_out": own["loss"]}
        difference = own["loss"] - base["loss"]
        yield Row.rate(f"method {name}", own["rate"], base["rate"], "tokens/s", loss_difference=difference, more=more)


def _pair(name: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """A method and full training in turn: what is measured of each."""
    pair = (METHODS[name], METHODS["full"])
    sides = [Side("methods:train", {**m, "vocabulary": arguments.vocabulary}, arguments.threads) for m in pair]
    for _ in range(WARM + (arguments.rounds or ROUNDS)):
        for side in sides:
            side.turn()
    rates = [median([t["tokens"] / t[arguments.clock] for t in side.turns[WARM:]]) for side in sides]
    return [{**side.end(), "rate": rate} for side, rate in zip(sides, rates, strict=True)]


def _is_installed(method: dict[str, Any]) -> bool:
    from luthier.plugins.registry import installed_plugins

    wanted = {"adapter": method["adapter"], "quantizer": method.get("quantizer", "none")}
    return all(
        name in {offer.record.name for offer in installed_plugins().offers(kind)} for kind, name in wanted.items()
    )


def train(gate: Gate, method: dict[str, Any]) -> None:
    """One method on the embedded recipe's kind of rows, a turn for each step."""
    import luthier
    import luthier.training.train_run  # noqa: F401 - loaded before memory counts

    from tests.speed.kept import Kept
    from tests.speed.work import blocks, held_out_loss, llama, token_rows, tokenizer

    model = llama(method.pop("vocabulary"), dtype=method.pop("dtype", "float32"))
    length = method.pop("sequence", 0)  # of rows of random tokens, in the place of gsm8k's
    rows = blocks(BLOCKS + HELD_OUT, length) if length else token_rows(ROWS + HELD_OUT)
    steps: list[dict[str, float]] = []
    shares: list[float] = []  # of the parameters that train, before the handed model gets its own flags back
    kept = Kept(model)

    class Turns:
        @luthier.event
        def step_started(self, run: Any) -> None:
            if not gate.arrive(**(steps[-1] if steps else {})):
                run.request_stop("measured")
            if not steps:  # the first step's time is not measured
                shares.append(_trained_share(model))
                kept.begin()

        @luthier.event
        def step_ended(self, metrics: dict[str, float]) -> None:
            kept.end()
            steps.append({"tokens": metrics["tokens"]})

    if method["adapter"] in ("lora", "dora"):
        method["adapter"] = {
            "name": method["adapter"],
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
        }
    gate.baseline()
    with tempfile.TemporaryDirectory() as folder:
        run = luthier.train(
            model=(model, tokenizer()),
            data=list(rows[:-HELD_OUT]),
            exact_callbacks=[Turns()],
            output_dir=f"{folder}/run",
            lr_scheduler_type="constant",
            **method,
        )
        gate.close(loss=held_out_loss(run.model, rows[-HELD_OUT:]), share=shares[0], kept=kept.bytes)


def _trained_share(model: Any) -> float:
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(count for count, trains in counts if trains) / sum(count for count, _ in counts)
