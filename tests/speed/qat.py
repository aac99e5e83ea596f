"""QAT: a whole step of ternary training with int8 activations, beside a plain torch loop with fake quantization."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from tests.speed.sides import Side, median
from tests.speed.table import Row
from tests.speed.worker import Gate

WARM, ROUNDS = 2, 5
TURNS = 64  # more than are measured
RATE = 1e-3


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocabulary", type=int, default=8192, help="with it the Llama has 32M parameters")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a row, all supervised")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="of the peer's products")


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    shared = {"vocabulary": arguments.vocabulary, "sequence": arguments.sequence}
    quantizer = {"name": "bitnet", "method": "absmean"}
    own = {"adapter": "full", "quantizer": quantizer, "learning_rate": RATE, "global_batch_size": arguments.batch}
    for dtype in arguments.dtype:
        plain = {**shared, "batch": arguments.batch, "dtype": dtype}
        sides = [
            Side("methods:train", {**shared, **own}, arguments.threads),
            Side("qat:plain", plain, arguments.threads),
        ]
        for _ in range(WARM + (arguments.rounds or ROUNDS)):
            for side in sides:
                side.turn()
        rates = [median([t["tokens"] / t[arguments.clock] for t in side.turns[WARM:]]) for side in sides]
        memory = [side.end()["whole_peak"] / 2**20 for side in sides]
        more = {"memory_mib": memory[0], "peer_memory_mib": memory[1]}
        yield Row.rate(f"QAT step, beside plain torch in {dtype}", *rates, "tokens/s", more=more)


def plain(gate: Gate, work: dict[str, Any]) -> None:
    """The peer: transformers' model and loss, both roundings straight through, torch's fused AdamW."""
    import torch

    from tests.speed.work import blocks, llama

    model = llama(work["vocabulary"]).train()
    replace_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)
    count, length = work["batch"], work["sequence"]
    rows = torch.tensor([row["input_ids"] for row in blocks(TURNS * count, length)])
    gate.baseline()
    for batch in rows.split(count):
        if not gate.arrive(tokens=float(batch.numel())):
            break
        with torch.autocast("cpu", torch.bfloat16, enabled=work["dtype"] == "bfloat16"):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    gate.close()


def replace_layers(model: Any) -> None:
    """Let every linear layer but the head compute with fake quantization."""
    import torch
    from torch import nn

    from tests.speed.kernels import fake_quantized

    class FakeQuantized(nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return fake_quantized(states, self.weight)

    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not model.get_output_embeddings():
            made: nn.Module = FakeQuantized(layer.in_features, layer.out_features, bias=False)
            made.weight = layer.weight
            model.set_submodule(path, made)
