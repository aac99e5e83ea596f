"""The plan: what a run would be, without training: parts, parameters, memory by cause, steps, packing."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import attrs
import torch

from luthier.data.pack import pack
from luthier.engine.assemble import Objects, assemble
from luthier.engine.roles import role
from luthier.engine.seeds import kept
from luthier.engine.setup import Setup
from luthier.recipe import Recipe


@attrs.frozen(kw_only=True)
class Plan:
    """Plain numbers; bytes for memory, tokens for lengths."""

    parts: list[dict[str, Any]]
    parameters: dict[str, dict[str, int]]  # by module kind: total, trainable
    memory: dict[str, int]
    schedule: dict[str, float]
    packing: dict[str, float]
    coverage: dict[str, Any]
    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return attrs.asdict(self)


def plan(recipe: Recipe, objects: Objects) -> Plan:
    """Load, check and attach everything, and count."""
    with kept():
        assembled = assemble(recipe, objects)
    setup = assembled.setup
    packing = _packing(setup)
    return Plan(
        parts=[part.describe() for part in assembled.resolved],
        parameters=_parameters(setup),
        memory=_memory(setup, int(packing["largest_micro_batch"])),
        schedule=_schedule(setup),
        packing=packing,
        coverage=setup.adapter.coverage() if hasattr(setup.adapter, "coverage") else {},
        data=setup.report.to_dict(),
    )


def _parameters(setup: Setup) -> dict[str, dict[str, int]]:
    """Parameters by kind of module, shared ones once, the adapter's apart."""
    model = setup.model
    adapted = {id(p) for g in setup.adapter.groups() if g.role == "adapter" for p in g.parameters}
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"total": 0, "trainable": 0})
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    seen: set[int] = set()
    for path, owner in model.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = role(name, owner, embedding, head)
            kind = "adapter" if id(parameter) in adapted else _module_kind(path) if kind == "hidden" else kind
            counts[kind]["total"] += parameter.numel()
            counts[kind]["trainable"] += parameter.numel() if parameter.requires_grad else 0
    whole = {key: sum(c[key] for c in counts.values()) for key in ("total", "trainable")}
    return {**counts, "all": whole}


def _module_kind(path: str) -> str:
    names = path.lower()
    if "expert" in names or "router" in names or names.endswith(".gate"):
        return "experts"
    return "attention" if "att" in names else "mlp"


def _memory(setup: Setup, tokens: int) -> dict[str, int]:
    """Bytes by cause. Activations are an estimate for the largest micro-batch without checkpointing."""
    stored = {id(t): t for t in (*setup.model.parameters(), *setup.model.buffers())}
    trainable = [p for g in setup.optimizer.param_groups for p in g["params"]]
    size = sum(p.numel() * p.element_size() for p in trainable)
    config = setup.model.config.get_text_config()
    width = setup.model.get_input_embeddings().weight.element_size()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_token = config.num_hidden_layers * (12 * config.hidden_size + 4 * inner) * width
    found = {
        "weights": sum(t.numel() * t.element_size() for t in stored.values()),
        "gradients": size,
        "optimizer": _optimizer_bytes(setup, trainable),
        "activations": tokens * per_token,
    }
    return {**found, "total": sum(found.values())}


def _optimizer_bytes(setup: Setup, trainable: list[torch.nn.Parameter]) -> int:
    """Measured, not assumed: one step of a fresh optimizer of this kind over one tiny parameter."""
    from luthier.plugins.protocols import Group

    sample = torch.nn.Parameter(torch.zeros(32, 32, dtype=trainable[0].dtype))
    sample.grad = torch.zeros_like(sample)
    optimizer = setup.optimizer_part.build([Group(parameters=[sample], names=["sample"])])
    optimizer.step()
    held = sum(t.numel() * t.element_size() for t in optimizer.state[sample].values() if isinstance(t, torch.Tensor))
    return math.ceil(held / sample.numel() * sum(p.numel() for p in trainable))


def _schedule(setup: Setup) -> dict[str, float]:
    order, train = setup.order, setup.train
    return {
        "examples": len(train),
        "steps_per_epoch": order.steps_per_epoch,
        "total_steps": len(setup.rates),
        "epochs": len(setup.rates) / order.steps_per_epoch,
        "tokens_per_epoch": int(train.lengths.sum()),
        "supervised_tokens_per_epoch": int(train.num_supervised.sum()),
        "validation_examples": len(setup.validation) if setup.validation is not None else 0,
        "peak_learning_rate": max(setup.rates),
    }


def _packing(setup: Setup) -> dict[str, float]:
    """How full the micro-batches of one epoch would be."""
    limit, lengths = setup.recipe.max_tokens_per_device, setup.train.lengths
    loads: list[int] = []
    for _, rows in setup.order.steps(setup.order.steps_per_epoch):
        own = [int(lengths[i]) for i in rows]
        bins = pack(own, limit) if setup.recipe.packing else [[i] for i in range(len(own))]
        loads += [sum(own[i] for i in members) for members in bins]
    steps = setup.order.steps_per_epoch
    return {
        "max_tokens_per_device": limit,
        "micro_batches_per_step": len(loads) / steps,
        "documents_per_micro_batch": len(setup.train) / len(loads),
        "largest_micro_batch": max(loads),
        "efficiency": sum(loads) / (len(loads) * max(loads)),
    }
