"""Operations of luthier-kernels beside what others have for the same: bitsandbytes, PEFT, plain torch, torchao.

Sides take turns in one process on the same tensors. `floor_ms` is the matrix products that neither side can save.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tests.speed.table import Row

if TYPE_CHECKING:
    from torch import Tensor, nn

ROUNDS = 5
PEERS = ("torch", "bitsandbytes", "peft")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # bitsandbytes would ask a hub for a binary at import


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peers", default=",".join(PEERS), help="comma-separated; those that are not installed are left out"
    )
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--width", type=int, default=1024, help="inputs of a layer, and of others multiples of it")
    parser.add_argument("--rows", type=int, default=1024, help="tokens of a training step")


def cases(arguments: argparse.Namespace) -> Iterator[Row]:
    import torch

    torch.manual_seed(0)
    peers = [name for name in arguments.peers.split(",") if importlib.util.find_spec(name)]
    for name, peer, make in CASES:
        if peer in peers and arguments.only in name:
            yield _row(arguments, f"{name}, beside {peer}", *make(arguments))


def _row(
    arguments: argparse.Namespace, case: str, ours: Callable[[], Any], theirs: Callable[[], Any], *more: Any
) -> Row:
    """One comparison: sides in turns, the least time of each."""
    spent: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range((arguments.rounds or ROUNDS) + 1):  # the first is not counted
        _timed(spent["ours"], ours, arguments.clock)
        _timed(spent["peer"], theirs, arguments.clock)
    mine, other = (min(spent[side][1:]) * 1e3 for side in ("ours", "peer"))
    return Row.cost(case, mine, other, "ms", more=dict(more[0]) if more else {})


def _timed(into: list[float], work: Callable[[], Any], clock: str) -> None:
    now = time.process_time if clock == "cpu" else time.perf_counter
    began = now()
    work()
    into.append(now() - began)


def quantize_nf4(arguments: argparse.Namespace, nested: bool = True) -> tuple[Any, ...]:
    import bitsandbytes.functional as bnb
    import torch
    from luthier_kernels import FourBitWeight

    weight = torch.randn(2 * arguments.width, 2 * arguments.width).bfloat16()
    packed, _ = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    same = torch.equal(packed.view(-1), FourBitWeight.from_weight(weight, double_quantization=nested).packed)
    theirs = lambda: bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)  # noqa: E731
    return lambda: FourBitWeight.from_weight(weight, double_quantization=nested), theirs, {"same_bytes": same}


def dequantize_nf4(arguments: argparse.Namespace) -> tuple[Any, ...]:
    import bitsandbytes.functional as bnb
    import torch
    from luthier_kernels import FourBitWeight

    weight = torch.randn(4 * arguments.width, 4 * arguments.width).bfloat16()
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = FourBitWeight.from_weight(weight)
    same = torch.equal(ours.dequantize(torch.bfloat16), bnb.dequantize_4bit(packed, state))
    theirs = lambda: bnb.dequantize_4bit(packed, state)  # noqa: E731
    return lambda: ours.dequantize(torch.bfloat16), theirs, {"same_values": same}


def step_qlora(arguments: argparse.Namespace, dtype: str = "bfloat16") -> tuple[Any, ...]:
    """Forward and backward of LoRA (rank 16) on an MLP of three NF4 layers, as both libraries wrap them."""
    import torch

    states = torch.randn(arguments.rows, arguments.width, dtype=getattr(torch, dtype))
    sides = []
    for make in (_our_mlp, _peft_mlp):
        torch.manual_seed(0)
        sides.append(_training(make(arguments.width, getattr(torch, dtype)), states))
    difference = float((sides[0](value=True) - sides[1](value=True)).abs())
    return *sides, {"loss_difference_of_sides": difference}


def _training(model: nn.Module, states: Tensor) -> Callable[..., Any]:
    def step(value: bool = False) -> Any:
        leaf = states.clone().requires_grad_()
        loss = model(leaf).float().square().mean()
        if value:
            return loss.detach()
        loss.backward()
        return None

    return step


def _mlp(width: int, dtype: Any) -> nn.Module:
    import torch
    from torch import nn

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = width * 11 // 4
            self.gate, self.up = (nn.Linear(width, inner, bias=False, dtype=dtype) for _ in range(2))
            self.down = nn.Linear(inner, width, bias=False, dtype=dtype)

        def forward(self, states: Tensor) -> Tensor:
            return self.down(torch.nn.functional.silu(self.gate(states)) * self.up(states))

        def get_output_embeddings(self) -> None:
            return None

    return Mlp()


def _our_mlp(width: int, dtype: Any) -> nn.Module:
    from luthier.testing import context
    from luthier.testing.worlds import tiny_model
    from luthier_lora.layers import Form, Switch
    from luthier_lora.wrappers import LoraLayer
    from luthier_nf4 import Nf4
    from luthier_nf4.quantizer import FourBitQuantizer

    part = FourBitQuantizer(Nf4())
    model = part.apply(_mlp(width, dtype), context(tiny_model()))
    import torch

    form = Form(rank=16, scale=2.0, dropout=0.0, dtype=torch.float32, device=torch.device("cpu"))
    for name in ("gate", "up", "down"):
        setattr(model, name, LoraLayer(getattr(model, name), form, Switch(), part.dequantize))
    return model


def _peft_mlp(width: int, dtype: Any) -> nn.Module:
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    model = _mlp(width, dtype)
    for name in ("gate", "up", "down"):
        dense = getattr(model, name)
        made = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
        )
        made.weight = bnb.nn.Params4bit(
            dense.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        setattr(model, name, made.to(torch.device("cpu")))
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=["gate", "up", "down"])
    return inject_adapter_in_model(config, model)


def step_ternary(arguments: argparse.Namespace, factor: int = 1) -> tuple[Any, ...]:
    """Forward and backward of a layer of float32 master weights, ours on bfloat16 states, beside float32 throughout."""
    import torch
    from luthier_kernels import multiply_ternary, quantize_ternary

    inner, outer, rows = arguments.width, factor * arguments.width, arguments.rows
    weight = torch.randn(outer, inner).requires_grad_()
    single = torch.randn(rows, inner)
    upstream = torch.randn(rows, outer)
    half, half_upstream = single.bfloat16(), upstream.bfloat16()

    def ours() -> None:
        states = half.clone().requires_grad_()
        multiply_ternary(states, weight, *quantize_ternary(weight)).backward(half_upstream)
        weight.grad = None

    def theirs() -> None:
        states = single.clone().requires_grad_()
        fake_quantized(states, weight).backward(upstream)
        weight.grad = None

    with torch.no_grad():
        found = multiply_ternary(single, weight, *quantize_ternary(weight))
        expected = fake_quantized(single, weight)
    return ours, theirs, {"forward_difference": float((found - expected).norm() / expected.norm())}


def fake_quantized(states: Tensor, weight: Tensor) -> Tensor:
    """BitNet's layer in plain torch: both roundings straight through."""
    import torch

    scale = weight.detach().abs().mean().clamp(min=1e-5)
    ternary = weight + ((weight / scale).round().clamp(-1, 1) * scale - weight).detach()
    largest = states.detach().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    rounded = states + ((states * 127 / largest).round().clamp(-128, 127) * largest / 127 - states).detach()
    return torch.nn.functional.linear(rounded, ternary)


def decode_ternary(arguments: argparse.Namespace, packed: bool = False, layers: int = 1) -> tuple[Any, ...]:
    """One row by square layers of four widths, beside bfloat16. Eight layers in turn are larger than a cache."""
    import torch
    from luthier_kernels import multiply_packed, multiply_ternary, quantize_ternary
    from luthier_kernels.ternary.packing import pack_columns

    weight = torch.randn(4 * arguments.width, 4 * arguments.width)
    states, half = torch.randn(1, 4 * arguments.width).bfloat16(), weight.bfloat16()
    codes, scales = quantize_ternary(weight)
    halves = [half.clone() for _ in range(layers)]
    weights = [(pack_columns(codes) if packed else codes).clone() for _ in range(layers)]
    products = max(layers, 10)

    def ours() -> None:
        with torch.no_grad():
            for i in range(products):
                weight = weights[i % layers]
                multiply_packed(states, weight, scales) if packed else multiply_ternary(states, half, weight, scales)

    def theirs() -> None:
        with torch.no_grad():
            for i in range(products):
                torch.nn.functional.linear(states, halves[i % layers])

    return ours, theirs, {"products": products}


def step_norm(arguments: argparse.Namespace, quantized: bool = False) -> tuple[Any, ...]:
    """RMSNorm of bfloat16 states: forward and backward, or forward to int8."""
    import torch
    from luthier_kernels.elementwise import normalize_quantized, normalize_rms

    states, weight = torch.randn(arguments.rows, 2 * arguments.width).bfloat16(), torch.ones(2 * arguments.width)

    def eager(x: Tensor) -> Tensor:
        wide = x.float()
        return weight.bfloat16() * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()

    def eager_codes() -> Any:
        made = eager(states).float()
        largest = made.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return (made * 127 / largest).round().clamp(-128, 127).to(torch.int8), largest / 127

    if quantized:
        return lambda: normalize_quantized(states, weight), eager_codes
    return _both_ways(lambda x: normalize_rms(x, weight), states), _both_ways(eager, states)


def step_rotation(arguments: argparse.Namespace) -> tuple[Any, ...]:
    """Rotary positions of 16 bfloat16 heads of 64, forward and backward."""
    import torch
    from luthier_kernels.elementwise import rotate_heads

    heads = torch.randn(arguments.rows, 16, 64).bfloat16()
    angles = torch.cat([torch.randn(arguments.rows, 32)] * 2, -1)
    positions = torch.arange(arguments.rows)
    c, s = angles.cos().bfloat16()[:, None], angles.sin().bfloat16()[:, None]

    def eager(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * c + torch.cat([-b, a], -1) * s

    ours = lambda x: rotate_heads(x, angles.cos(), angles.sin(), positions)  # noqa: E731
    return _both_ways(ours, heads), _both_ways(eager, heads)


def step_attention(arguments: argparse.Namespace, length: int = 512) -> tuple[Any, ...]:
    """Attention within documents of 8 bfloat16 heads of 64, both ways, beside the engine's own in plain torch."""
    import torch
    from luthier.model.attention.ways import attend_documents as attend_plainly
    from luthier_kernels.attention import attend_documents

    starts = torch.tensor([*range(0, arguments.rows, length), arguments.rows])
    heads = torch.randn(arguments.rows, 8, 64).bfloat16()
    module = torch.nn.Module()

    def plain(x: Tensor) -> Tensor:
        turned = x.transpose(0, 1)[None]
        return attend_plainly(module, turned, turned, turned, None, cu_seq_lens_k=starts)[0][0]

    return _both_ways(lambda x: attend_documents(x, x, x, starts, 0.125), heads), _both_ways(plain, heads)


def step_gate(arguments: argparse.Namespace) -> tuple[Any, ...]:
    """SwiGLU of bfloat16 states, forward and backward. Both gradients are new, so that nothing is added up."""
    import torch
    from luthier_kernels.elementwise import gate_states

    gate = torch.randn(arguments.rows, 4 * arguments.width).bfloat16()
    up = torch.randn_like(gate)
    eager = lambda x, y: torch.nn.functional.silu(x) * y  # noqa: E731
    fresh = lambda: up.detach().requires_grad_()  # noqa: E731
    return _both_ways(lambda x: gate_states(x, fresh()), gate), _both_ways(lambda x: eager(x, fresh()), gate)


def _both_ways(function: Callable[[Tensor], Tensor], states: Tensor) -> Callable[[], None]:
    import torch

    upstream = torch.randn_like(states)

    def run() -> None:
        leaf = states.detach().requires_grad_()
        function(leaf).backward(upstream)

    return run


def step_adamw(arguments: argparse.Namespace, peer: str = "bitsandbytes", bits: int = 8) -> tuple[Any, ...]:
    """One step of four square float32 parameters."""
    import torch
    from luthier_kernels.optimizers import AdamW, AdamW8bit

    made = []
    for side in ("ours", peer):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(arguments.width, arguments.width)) for _ in range(4)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * 1e-2
        if side == "ours":
            optimizer: Any = (AdamW8bit if bits == 8 else AdamW)(parameters, lr=1e-3, weight_decay=0.01)
        elif side == "torch":
            optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True)
        else:
            import bitsandbytes as bnb

            optimizer = bnb.optim.AdamW8bit(parameters, lr=1e-3, weight_decay=0.01)
        made.append(optimizer)
    total = 4 * arguments.width**2
    return made[0].step, made[1].step, {"parameters": total}


CASES = [
    ("NF4 quantization, nested", "bitsandbytes", quantize_nf4),
    ("NF4 quantization, plain scales", "bitsandbytes", lambda given: quantize_nf4(given, False)),
    ("NF4 dequantization, nested, bfloat16", "bitsandbytes", dequantize_nf4),
    ("LoRA on an NF4 MLP, step, bfloat16", "peft", step_qlora),
    ("LoRA on an NF4 MLP, step, float32", "peft", lambda given: step_qlora(given, "float32")),
    ("ternary layer, step, square", "torch", step_ternary),
    ("ternary layer, step, 1 to 4", "torch", lambda given: step_ternary(given, 4)),
    ("ternary decoding, one row, int8 codes", "torch", decode_ternary),
    ("ternary decoding, one row, int8 codes of 8 layers", "torch", lambda given: decode_ternary(given, layers=8)),
    ("RMSNorm to int8, bfloat16", "torch", lambda given: step_norm(given, True)),
    ("RMSNorm, both ways, bfloat16", "torch", step_norm),
    ("RoPE, both ways, bfloat16", "torch", step_rotation),
    ("attention in documents of 512, both ways, bfloat16", "torch", step_attention),
    ("attention in documents of 200, both ways, bfloat16", "torch", lambda given: step_attention(given, 200)),
    ("SwiGLU, both ways, bfloat16", "torch", step_gate),
    ("8-bit AdamW, step", "bitsandbytes", step_adamw),
    ("8-bit AdamW, step", "torch", lambda given: step_adamw(given, "torch")),
    ("AdamW in float32, step", "torch", lambda given: step_adamw(given, "torch", 32)),
    ("ternary decoding, one row, two bits", "torch", lambda given: decode_ternary(given, True)),
    ("ternary decoding, one row, two bits of 8 layers", "torch", lambda given: decode_ternary(given, True, 8)),
]
