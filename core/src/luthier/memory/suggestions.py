"""Defaults that depend on hardware and data: one pure function, each value with its reason."""

from __future__ import annotations

import math
from typing import Any, Final

import attrs

GB: Final = 10**9
NEARLY: Final = 0.95  # a GPU sold with 16 GB has slightly less
PER_DEVICE: Final = ((48, 8), (32, 6), (24, 4), (16, 2))  # (GB of GPU memory, examples of one micro-batch)
STEPS: Final = 100  # optimizer steps that one epoch should have
BATCHES: Final = (8, 64)  # the smallest and the largest global batch that is suggested
RANKS: Final = ((1_000, 8), (10_000, 16), (100_000, 32))  # (examples, the LoRA rank for fewer than these)
UNKNOWN: Final = {"global_batch_size": 32, "adapter.r": 16}  # suggestions for a stream, whose length is unknown
ANCHOR: Final = (8e9, 2e-5)  # parameters of a model, and the usual rate of its full fine-tuning
EXPONENT: Final = 0.4  # how the rate falls with size, from 1e-4 at 100M, and for less, to 8e-6 at 70B
SMALLEST: Final = 1e8
FEW: Final = 0.2  # the share of trained weights below which ten times that rate is right


@attrs.frozen(kw_only=True)
class Hardware:
    """`kind` is cpu, cuda or mps; `memory` bytes of one device; `ranks` processes that train together."""

    kind: str
    memory: int
    ranks: int = 1


@attrs.frozen(kw_only=True)
class Task:
    """The task of a run: the model's parameters, those that train, and the number of examples, where that is known."""

    parameters: int
    trainable: int
    examples: int | None = None


@attrs.frozen(kw_only=True)
class Suggestion:
    """A value for an option of the recipe, and why."""

    option: str
    value: Any
    reason: str


def suggest_values(hardware: Hardware, task: Task) -> list[Suggestion]:
    """Return the batch and its accumulation, the learning rate and the rank; the same numbers give the same values."""
    batch, own = global_batch(hardware, task), per_device(hardware)
    turns = math.ceil(batch.value / (own.value * hardware.ranks))
    reason = f"{batch.value} examples in turns of {own.value} on {_counted(hardware.ranks, 'device')}"
    steps = Suggestion(option="gradient_accumulation_steps", value=turns, reason=reason)
    return [batch, own, steps, rate(task), rank(task)]


def global_batch(hardware: Hardware, task: Task) -> Suggestion:
    """Examples of one optimizer step: a power of two with about 100 steps an epoch, alike for every rank."""
    option, (low, high) = "global_batch_size", BATCHES
    if task.examples is None:
        value = -(-UNKNOWN[option] // hardware.ranks) * hardware.ranks
        return Suggestion(option=option, value=value, reason="how many examples there are is not known")
    wanted = 2 ** math.floor(math.log2(max(task.examples / STEPS, 1)))
    value = -(-min(max(wanted, low), high) // hardware.ranks) * hardware.ranks
    bounds = f", within {low} to {high}" if not low <= wanted <= high else ""
    steps = _counted(math.ceil(task.examples / value), "step")
    reason = f"{task.examples:,} examples make {steps} an epoch; about {STEPS} are wanted{bounds}"
    return Suggestion(option=option, value=value, reason=reason)


def per_device(hardware: Hardware) -> Suggestion:
    """Examples of one micro-batch where they are not packed."""
    size, option = hardware.memory / GB, "per_device_train_batch_size"
    if hardware.kind != "cuda":
        return Suggestion(option=option, value=1, reason=f"on a {hardware.kind} larger ones are no faster")
    for least, value in PER_DEVICE:
        if size >= NEARLY * least:
            return Suggestion(option=option, value=value, reason=f"the GPU has {size:.0f} GB: {least} or more")
    return Suggestion(option=option, value=1, reason=f"the GPU has {size:.0f} GB: less than {PER_DEVICE[-1][0]}")


def rate(task: Task) -> Suggestion:
    """Return the peak learning rate: it falls with the model's size, and is ten times as high if little trains."""
    size, known = ANCHOR
    value, share = known * (size / max(task.parameters, SMALLEST)) ** EXPONENT, task.trainable / task.parameters
    reason = f"{task.parameters / 1e6:,.0f}M parameters, of which {share:.2%} train"
    if share < FEW:
        value, reason = 10 * value, f"{reason}: ten times the rate of full training"
    return Suggestion(option="learning_rate", value=float(f"{value:.0e}"), reason=reason)


def rank(task: Task) -> Suggestion:
    """Return the rank of a low-rank adapter: more rows teach more than a small one holds."""
    option = "adapter.r"
    if task.examples is None:
        return Suggestion(option=option, value=UNKNOWN[option], reason="how many examples there are is not known")
    for least, value in RANKS:
        if task.examples < least:
            return Suggestion(option=option, value=value, reason=f"{task.examples:,} examples: below {least:,}")
    return Suggestion(option=option, value=64, reason=f"{task.examples:,} examples: {RANKS[-1][0]:,} or more")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
