"""Preference training with LoRA, DPO or ORPO, against TRL's trainers on the same pairs, weights and order."""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from typing import Any

from tests.speed.sides import Side
from tests.speed.table import Row
from tests.speed.work import PAIRS, SIZES, has_bf16
from tests.speed.worker import Gate

WARM = 2  # turns that are not measured: compilation, caches
ROUNDS = 6
BETA = 0.1
RATE = 1e-4
ADAPTER = {"name": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


def pair_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", choices=("trl",), default="trl")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8192])
    parser.add_argument("--size", choices=SIZES, default="24m", help="parameters without the embeddings")
    parser.add_argument("--pairs", choices=PAIRS, default="pandalm", help="whose rows, in the folder LUTHIER_DATA")
    parser.add_argument("--batch", type=int, default=8, help="pairs of one step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--max-tokens", type=int, default=8192, help="our tokens of one micro-batch")
    parser.add_argument("--setting", type=int, help="the peer's setting of this number, not the best that is searched")


def compare_pairs(kind: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Compare pairs a second and memory with the fastest of the peer's settings, and the losses of all measured steps."""
    settings = _peer_settings(arguments)
    for vocabulary in arguments.vocabulary:
        work = {name: getattr(arguments, name) for name in ("size", "batch", "device", "max_tokens", "pairs")}
        work |= {"vocabulary": vocabulary, "kind": kind, "steps": WARM + (arguments.rounds or ROUNDS)}
        best = settings[_fastest(work, settings, arguments) if arguments.setting is None else arguments.setting]
        sides = [
            Side(f"pairs:{name}", {**work, **more}, arguments.threads) for name, more in (("ours", {}), ("trl", best))
        ]
        for _ in range(work["steps"]):
            for side in sides:
                side.turn()
        ours, peer = (_numbers(side, work["batch"], arguments.clock) for side in sides)
        about = {"setting": best, "loss": ours["loss"], "threads": arguments.threads, "clock": arguments.clock}
        difference = ours["loss"] - peer["loss"]
        case = f"{kind} lora {arguments.size} {arguments.pairs} vocabulary {vocabulary}"
        yield Row.rate(case, ours["rate"], peer["rate"], "pairs/s", loss_difference=difference, more=about)
        yield Row.cost(
            f"{case} memory", ours["memory"], peer["memory"], "MiB above the model", loss_difference=difference
        )


def _peer_settings(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the settings of the peer that are tried: a step at once, or in smaller micro-batches, which pad less.

    Padding-free batches are not among them: TRL 1.16 warns that it has none for pairs, and pads.
    """
    most = min(arguments.batch, PAIRS[arguments.pairs].most_at_once or arguments.batch)
    sizes = [size for size in range(most, 0, -1) if arguments.batch % size == 0]
    return [{"bf16": has_bf16(arguments.device), "micro_batch": size} for size in sizes]


def _fastest(work: dict[str, Any], settings: list[dict[str, Any]], arguments: argparse.Namespace) -> int:
    """Return the number of the peer's setting with the most pairs a second."""
    short = {**work, "steps": WARM + 2}
    rates = [_measured("trl", {**short, **each}, arguments)["rate"] for each in settings]
    return max(range(len(settings)), key=rates.__getitem__)


def _measured(name: str, work: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    side = Side(f"pairs:{name}", work, arguments.threads)
    for _ in range(work["steps"]):
        side.turn()
    return _numbers(side, work["batch"], arguments.clock)


def _numbers(side: Side, batch: int, clock: str) -> dict[str, float]:
    """Return what the measured steps say together: one step may hold many more tokens than another."""
    closing, measured = side.end(), side.turns[WARM:]
    rate = batch * len(measured) / sum(turn[clock] for turn in measured)
    loss = sum(turn["loss"] for turn in measured) / len(measured)
    return {"rate": rate, "loss": loss, "memory": closing["first_peak"] / 2**20}


def _material(work: dict[str, Any]) -> tuple[Any, Any, list[dict[str, str]]]:
    """Return the model, its tokenizer, and the pairs in the order in which both sides train on them."""
    from tests.speed.work import llama, pair_rows, tokenizer

    model = llama(work["vocabulary"], device=work["device"], **SIZES[work["size"]])
    tokens = tokenizer()
    tokens.chat_template = (
        None  # with one, texts that answer a prompt are a chat of ours, and as they stand for the peer
    )
    count = work["steps"] * work["batch"] + 1  # the last step is never measured: with it both sides wait for the end
    rows = pair_rows(count, work["pairs"])
    whole = rows[: len(rows) - len(rows) % work["batch"]]  # no step holds a pair twice, nor fewer than `batch`
    return model, tokens, list(itertools.islice(itertools.cycle(whole), count))


def ours(gate: Gate, work: dict[str, Any]) -> None:
    """Our side: `luthier.train`; the reference's log-probabilities are computed before the first step."""
    import luthier
    import luthier.training.train_run
    import luthier_lora.adapter  # noqa: F401 - libraries are loaded before memory counts
    from luthier.data.batches.row_order import order_rows

    from tests.speed.work import finished, same_updates

    model, tokens, ordered = _material(work)
    places = order_rows(len(ordered), 0, 0).tolist()
    rows = [row for _, row in sorted(zip(places, ordered, strict=True), key=lambda pair: pair[0])]
    losses: list[float] = []

    class Turns:
        @luthier.event
        def step_started(self, run: Any, step: int) -> None:
            if step == 1:
                same_updates(model)
            if not gate.arrive(**({"loss": losses[-1]} if losses else {})):
                run.request_stop("measured")

        @luthier.event
        def step_ended(self, metrics: dict[str, float]) -> None:
            finished(work["device"])
            losses.append(metrics["loss"])

    gate.baseline()
    with tempfile.TemporaryDirectory() as folder:
        luthier.train(
            model=(model, tokens),
            data=rows,
            adapter=ADAPTER,
            loss={"name": work["kind"], "beta": BETA, **({"nll_scope": "full"} if work["kind"] == "orpo" else {})},
            reference_cache=work["kind"] == "dpo",
            optimizer={"name": "adamw", "weight_decay": 0.0},
            learning_rate=RATE,
            lr_scheduler_type="constant",
            global_batch_size=work["batch"],
            max_tokens_per_device=work["max_tokens"],
            max_length=4096,
            callbacks=[Turns()],
            device=work["device"],
            output_dir=f"{folder}/run",
        )
        gate.close()


def trl(gate: Gate, work: dict[str, Any]) -> None:
    """The peer: its trainer on the same rows in the same order, with one of its settings."""
    import torch
    from peft import LoraConfig
    from transformers import TrainerCallback

    from tests.speed.work import finished, same_updates

    model, tokens, rows = _material(work)
    said: dict[str, float] = {}

    class Turns(TrainerCallback):
        goes_on = True

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            finished(work["device"])
            self.goes_on = gate.arrive(**said)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= not self.goes_on

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                said["loss"] = float(logs["loss"])

    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    gate.baseline()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(work, model, tokens, rows, folder, lora)
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
        trainer.add_callback(Turns())
        same_updates(trainer.model)
        trainer.train()
        gate.close()


def _trainer(work: dict[str, Any], model: Any, tokens: Any, rows: list[dict[str, str]], folder: str, lora: Any) -> Any:
    from datasets import Dataset

    settings = {
        **{"output_dir": folder, "bf16": work["bf16"], "per_device_train_batch_size": work["micro_batch"]},
        **{"gradient_accumulation_steps": work["batch"] // work["micro_batch"], "beta": BETA},
        **{"use_cpu": work["device"] == "cpu", "report_to": "none", "gradient_checkpointing": False},
        **{"learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_length": None},
        **{"optim": "adamw_torch_fused", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1},
    }
    about = {"processing_class": tokens, "train_dataset": Dataset.from_list(rows), "peft_config": lora}
    if work["kind"] == "dpo":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(model=model, args=DPOConfig(**settings, precompute_ref_log_probs=True), **about)
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer(model=model, args=ORPOConfig(**{**settings, "max_length": 4096}), **about)
