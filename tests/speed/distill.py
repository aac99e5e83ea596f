"""Whole steps of distillation with LoRA from a teacher of the same vocabulary, against TRL's divergence of full logits.

TRL's trainers generate, or want messages: its loss stands here in a plain loop over padded batches, with PEFT's LoRA, in
bfloat16 autocast where the device computes in that.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from typing import Any

from tests.speed.pairs import ADAPTER, RATE, ROUNDS, WARM
from tests.speed.sides import Side, median
from tests.speed.table import Row
from tests.speed.work import SIZES, has_bf16
from tests.speed.worker import Gate

BETA = 0.5  # of the generalised Jensen-Shannon divergence


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", choices=("trl",), default="trl")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[131072])
    parser.add_argument("--size", choices=SIZES, default="3m", help="parameters without the embeddings")
    parser.add_argument("--batch", type=int, default=2, help="rows of one step; eight of the peer need more than 23 GB")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    for vocabulary in arguments.vocabulary:
        work = {name: getattr(arguments, name) for name in ("size", "batch", "device")}
        work |= {"vocabulary": vocabulary, "steps": WARM + (arguments.rounds or ROUNDS)}
        work |= {"bf16": has_bf16(arguments.device)}
        sides = [Side(f"distill:{name}", work, arguments.threads) for name in ("ours", "trl")]
        for _ in range(work["steps"]):
            for side in sides:
                side.turn()
        closings = [side.end() for side in sides]
        rates = [median([work["batch"] / turn[arguments.clock] for turn in side.turns[WARM:]]) for side in sides]
        losses = [side.turns[-1]["loss"] for side in sides]
        case = f"distill lora {arguments.size} vocabulary {vocabulary}"
        about = {"loss": losses[0], "threads": arguments.threads, "clock": arguments.clock}
        yield Row.rate(case, *rates, "rows/s", loss_difference=losses[0] - losses[1], more=about)
        yield Row.cost(f"{case} memory", *(c["first_peak"] / 2**20 for c in closings), "MiB above the models")


def _material(work: dict[str, Any]) -> tuple[Any, Any, list[dict[str, list[int]]]]:
    from tests.speed.work import llama, token_rows

    about = {"device": work["device"], **SIZES[work["size"]]}
    student, teacher = (llama(work["vocabulary"], seed=seed, **about) for seed in (0, 1))
    return student, teacher, list(token_rows((work["steps"] + 1) * work["batch"]))


def ours(gate: Gate, work: dict[str, Any]) -> None:
    """Our side: `luthier.train` with a teacher that lies in a folder."""
    import luthier
    import luthier.training.train_run
    import luthier_lora.adapter  # noqa: F401 - libraries are loaded before memory counts

    from tests.speed.work import finished, same_updates, tokenizer

    (model, teacher, rows), tokens = _material(work), tokenizer()
    losses: list[float] = []

    class Turns:
        @luthier.event
        def step_started(self, run: Any, step: int) -> None:
            if step == 1:
                same_updates(model)
                gate.baseline()  # the teacher has been read
            if not gate.arrive(**({"loss": losses[-1]} if losses else {})):
                run.request_stop("measured")

        @luthier.event
        def step_ended(self, metrics: dict[str, float]) -> None:
            finished(work["device"])
            losses.append(metrics["loss"])

    with tempfile.TemporaryDirectory() as folder:
        teacher.save_pretrained(f"{folder}/teacher")
        tokens.save_pretrained(f"{folder}/teacher")
        del teacher
        luthier.train(
            model=(model, tokens),
            data=rows,
            adapter=ADAPTER,
            teacher={"model": f"{folder}/teacher"},
            loss={"name": "distill", "divergence": "jsd", "beta": BETA},
            optimizer={"name": "adamw", "weight_decay": 0.0},
            learning_rate=RATE,
            lr_scheduler_type="constant",
            global_batch_size=work["batch"],
            callbacks=[Turns()],
            device=work["device"],
            output_dir=f"{folder}/run",
        )
        gate.close()


def trl(gate: Gate, work: dict[str, Any]) -> None:
    """The peer: whole logits of both models, and TRL's divergence of them."""
    import torch
    from luthier.data.batches.row_order import order_rows
    from peft import LoraConfig, get_peft_model
    from trl.experimental.gkd import GKDTrainer

    from tests.speed.work import finished, same_updates

    student, teacher, rows = _material(work)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(student, lora).train()
    same_updates(model)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], RATE, weight_decay=0.0, fused=True
    )
    ordered, said = [rows[i] for i in order_rows(len(rows), 0, 0)], dict[str, float]()
    gate.baseline()
    for first in range(0, len(ordered), work["batch"]):
        if not gate.arrive(**said):
            break
        ids, mask, labels = _padded(ordered[first : first + work["batch"]], student.device)
        with torch.autocast(student.device.type, torch.bfloat16, enabled=work["bf16"]):
            given = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            with torch.no_grad():
                wanted = teacher(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = GKDTrainer.generalized_jsd_loss(given, wanted, labels[:, 1:], beta=BETA)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        finished(work["device"])
        said = {"loss": float(loss.detach())}
    gate.close()


def _padded(rows: list[dict[str, list[int]]], device: Any) -> tuple[Any, Any, Any]:
    """[B, L] each: tokens, mask and labels, padded on the right."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    spaces = [longest - len(row["input_ids"]) for row in rows]
    ids = [row["input_ids"] + [0] * n for row, n in zip(rows, spaces, strict=True)]
    mask = [[1] * len(row["input_ids"]) + [0] * n for row, n in zip(rows, spaces, strict=True)]
    labels = [row["labels"] + [-100] * n for row, n in zip(rows, spaces, strict=True)]
    return tuple(torch.tensor(part, device=device) for part in (ids, mask, labels))  # type: ignore[return-value]
