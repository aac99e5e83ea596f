"""Whole supervised steps, LoRA or full, against TRL at the best of its settings."""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.speed.sides import Side, median
from tests.speed.table import Row
from tests.speed.work import SIZES, has_bf16
from tests.speed.worker import Gate

WARM = 3  # turns that are not measured: compilation, caches
ROUNDS = 8
ROWS, HELD_OUT = 7000, 32  # an epoch of gsm8k, of which the first steps are measured
SETTINGS = [
    {"packing": packing, "padding_free": free, "bf16": True, "loaded": loaded}
    for packing, free in ((False, False), (False, True), (True, False))
    for loaded in ("float32", "bfloat16")
]
STEPS = 40  # that there are rows of `--sequence` tokens for
PUBLISHED = {("8b", "lora", 4096): 12_473}  # tokens/s on one H100: NeMo Automodel's own table
PLAIN = [{**setting, "bf16": False} for setting in SETTINGS if setting["loaded"] == "float32"]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", choices=("trl", "none"), default="trl")
    parser.add_argument("--method", choices=("lora", "full", "both"), default="both")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8192, 131072])
    parser.add_argument("--size", choices=SIZES, default="24m", help="parameters without the embeddings")
    parser.add_argument("--sequence", type=int, default=0, help="rows of so many random tokens in the place of gsm8k's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=16, help="rows of one step")
    parser.add_argument("--micro-batch", type=int, default=0, help="rows that the peer computes at once; 0: all")
    parser.add_argument("--set", action="append", default=[], help="a setting of our recipe, name=value")
    parser.add_argument("--setting", type=int, help="the peer's setting of this number, not the best that is searched")


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    methods = ("lora", "full") if arguments.method == "both" else (arguments.method,)
    for vocabulary in arguments.vocabulary:
        for method in methods:
            yield from _compare(arguments, method, vocabulary)


def _compare(arguments: argparse.Namespace, method: str, vocabulary: int) -> Iterator[Row]:
    work = {name: getattr(arguments, name) for name in ("size", "sequence", "device", "batch", "micro_batch", "set")}
    work |= {"method": method, "vocabulary": vocabulary}
    peer_setting = {} if arguments.peer == "none" else _best(arguments, work)
    sides = [Side("sft:ours", work, arguments.threads)]
    if arguments.peer != "none":
        sides.append(Side("sft:trl", {**work, **peer_setting}, arguments.threads))
    for _ in range(WARM + (arguments.rounds or ROUNDS)):
        for side in sides:
            side.turn()
    found = [_numbers(side, arguments.clock) for side in sides]
    name = f"sft {method} {arguments.size}" + (f" sequence {arguments.sequence}" if arguments.sequence else "")
    yield from _rows(f"{name} vocabulary {vocabulary}", found, arguments, peer_setting)
    published = PUBLISHED.get((arguments.size, method, arguments.sequence))
    if published and arguments.device == "cuda":
        yield Row.rate(f"{name} against NeMo Automodel on one H100", found[0]["rate"], published, "tokens/s")


def _rows(case: str, found: list[dict[str, Any]], arguments: argparse.Namespace, setting: Any) -> Iterator[Row]:
    ours, peer = found[0], found[1] if len(found) > 1 else None
    about = {"threads": arguments.threads, "clock": arguments.clock, "warm_seconds": ours["warm"]}
    about |= {"tflops": ours["tflops"], "peak_share": ours["peak_share"]}
    if peer is None:
        yield Row(case=case, ours=ours["rate"], peer=None, unit="tokens/s", ratio=None, more={**about, **ours})
        return
    difference = ours["loss"] - peer["loss"]
    more = {**about, "supervised_ours": ours["supervised"], "supervised_peer": peer["supervised"], "setting": setting}
    more |= {"held_out": ours["loss"], "peer_warm_seconds": peer["warm"]}
    yield Row.rate(case, ours["rate"], peer["rate"], "tokens/s", loss_difference=difference, more=more)
    memory = [side["closing"]["first_peak"] / 2**20 for side in (ours, peer)]
    yield Row.cost(f"{case} memory", *memory, "MiB above the model", loss_difference=difference)


def _best(arguments: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """The peer's setting with the most supervised tokens a second; imitated bfloat16 is never that."""
    settings = SETTINGS + PLAIN if has_bf16(arguments.device) else PLAIN
    if arguments.setting is not None:
        return settings[arguments.setting]
    rates = {}
    for number, setting in enumerate(settings):
        side = Side("sft:trl", {**work, **setting}, arguments.threads)
        for _ in range(WARM + 2):
            side.turn()
        rates[number] = _numbers(side, arguments.clock)["supervised"]
    return settings[max(rates, key=rates.__getitem__)]


def _numbers(side: Side, clock: str) -> dict[str, Any]:
    closing = side.end()
    measured = side.turns[WARM:]
    rates = {name: median([t[name] / t[clock] for t in measured]) for name in ("tokens", "supervised")}
    done = rates["tokens"] * closing["flops"] if "flops" in closing else 0.0  # operations a second
    share = done / closing["peak"] if done else None
    return {
        **{"rate": rates["tokens"], "supervised": rates["supervised"], "closing": closing, "loss": closing["loss"]},
        **{"warm": sum(t[clock] for t in side.turns[:WARM]), "tflops": done / 1e12, "peak_share": share},
    }


def ours(gate: Gate, work: dict[str, Any]) -> None:
    """Our side: `luthier.train` on a model in memory."""
    import luthier
    import luthier.training.train_run
    import luthier_lora.adapter  # noqa: F401 - libraries are loaded before memory counts

    from tests.speed.work import finished, held_out_loss, matmul_rate, same_updates, step_flops, tokenizer

    (model, rows, held_out), tokens = _material(work), tokenizer()
    steps: list[dict[str, float]] = []

    class Turns:
        @luthier.event
        def step_started(self, run: Any, step: int) -> None:
            if step == 1 and work["method"] == "lora":
                same_updates(model)
            if not gate.arrive(**(steps[-1] if steps else {})):
                run.request_stop("measured")

        @luthier.event
        def step_ended(self, metrics: dict[str, float]) -> None:
            finished(work["device"])
            steps.append({k: metrics[n] for k, n in (("tokens", "tokens"), ("supervised", "supervised_tokens"))})

    adapter = {"name": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
    settings = {"lr_scheduler_type": "constant", "learning_rate": 1e-3 if work["method"] == "lora" else 1e-4}
    settings |= dict(_pair(text) for text in work["set"])
    gate.baseline()
    with tempfile.TemporaryDirectory() as folder:
        luthier.train(
            model=(model, tokens),
            data=list(rows),
            adapter=adapter if work["method"] == "lora" else "full",
            exact_callbacks=[Turns()],
            device=work["device"],
            output_dir=f"{folder}/run",
            **{"global_batch_size": work["batch"], "optimizer": {"name": "adamw", "weight_decay": 0.0}, **settings},
        )
        length = sum(len(row["input_ids"]) for row in rows) / len(rows)
        supervised = sum(1 for row in rows for label in row["labels"] if label != -100) / len(rows) / length
        about = {"trained": work["method"] == "full", "supervised": supervised, "length": length}
        flops = step_flops(model, **about)
        gate.close(flops=flops, peak=matmul_rate(model), loss=held_out_loss(model, held_out))


def _material(work: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The model, the rows to train on, and those that are held out."""
    from tests.speed.work import blocks, llama, token_rows

    model = llama(work["vocabulary"], device=work["device"], **SIZES[work["size"]])
    if work["sequence"]:
        rows = blocks(STEPS * work["batch"] + 2, work["sequence"])
        return model, rows[:-2], rows[-2:]
    rows = token_rows(ROWS + HELD_OUT)
    return model, rows[:-HELD_OUT], rows[-HELD_OUT:]


def _pair(text: str) -> tuple[str, Any]:
    from luthier.recipe.reading.yaml12 import load_yaml

    name, _, value = text.partition("=")
    return name, load_yaml(value, "--set")[0]


def trl(gate: Gate, work: dict[str, Any]) -> None:
    """The peer: `SFTTrainer` on the same rows in our order, with one of its settings."""
    import torch
    from datasets import Dataset
    from luthier.data.batches.row_order import order_rows
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from tests.speed.work import finished, held_out_loss, same_updates, tokenizer

    (model, rows, held_out), tokens = _material(work), tokenizer()
    model = model.to(getattr(torch, work["loaded"]))
    ordered = [rows[i] for i in order_rows(len(rows), 0, 0)]
    lora = (
        LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
        if work["method"] == "lora"
        else None
    )

    class Sequential(SFTTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            labels = inputs["labels"]
            real = inputs["attention_mask"].sum() if "attention_mask" in inputs else labels.numel()
            seen.update(tokens=float(real), supervised=float((labels != -100).sum()))  # added up over a step
            return super().training_step(model, inputs, *rest, **named)

    class Turns(TrainerCallback):
        goes_on = True

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            finished(work["device"])
            self.goes_on = gate.arrive(**seen)
            seen.clear()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= not self.goes_on  # after a whole step, as ours

    seen: Counter[str] = Counter()
    mean = sum(len(r["input_ids"]) for r in ordered) / len(ordered)
    packed = work["packing"]
    at_once = 1 if packed else work["micro_batch"] or work["batch"]
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            **{"output_dir": folder, "bf16": work["bf16"], "packing": packed, "padding_free": work["padding_free"]},
            **{"per_device_train_batch_size": at_once, "use_cpu": work["device"] == "cpu", "report_to": "none"},
            **{"gradient_accumulation_steps": 1 if packed else work["batch"] // at_once},
            **{"max_length": int(mean * work["batch"]) if packed else None, "gradient_checkpointing": False},
            **{"learning_rate": 1e-3 if lora else 1e-4, "lr_scheduler_type": "constant", "weight_decay": 0.0},
            **{"optim": "adamw_torch_fused", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10_000},
        )
        gate.baseline()
        trainer = Sequential(
            model, config, train_dataset=Dataset.from_list(ordered), processing_class=tokens, peft_config=lora,
            callbacks=[Turns()],
        )  # fmt: skip
        if lora:
            same_updates(trainer.model)
        trainer.train()
        gate.close(loss=held_out_loss(trainer.model, held_out))
