"""The optimizer part `auto`: AdamW with as exact a state as fits into a share of the device's memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, Literal

import torch
from luthier import Group, get_logger

from luthier_optimizers.options import AdamW8bit, Auto, PagedAdamW
from luthier_optimizers.parts import EightBitAdamW, PagedAdamWPart, Part

EXACT, EIGHT_BITS = 8.0, 2.03  # bytes of state for each weight
LIMITS: Final = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
log = get_logger()


class AutoPart(Part):
    """AdamW, AdamW with moments in 8 bits, or AdamW whose moments lie in a file, by the memory that there is.

    The size of the memory counts, and not how much of it is free just now, so that a resumed run chooses the same. What
    the first build chose, later builds choose too: one of a sample measures what the run has.
    """

    name = "auto"

    def __init__(self, options: Auto) -> None:
        self.options = options
        self.chosen: str | None = None

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        o = self.options
        parameters = [parameter for group in groups for parameter in group.parameters]
        count = sum(parameter.numel() for parameter in parameters)
        memory = device_memory(parameters[0].device) if parameters else 0
        sharded = any(hasattr(parameter, "full_tensor") for parameter in parameters)  # which the others do not know
        if self.chosen is None:
            self.chosen = "adamw" if sharded else choose_optimizer(count, memory, o.memory_share)
            log.info("optimizer chosen", optimizer=self.chosen, weights=count, memory=memory, share=o.memory_share)
        shared: dict[str, Any] = {"betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
        if self.chosen == "paged_adamw":
            return PagedAdamWPart(PagedAdamW(folder=o.folder, **shared)).build(groups)
        if self.chosen == "adamw_8bit":
            return EightBitAdamW(AdamW8bit(**shared)).build(groups)
        settings = [group.settings(o.weight_decay) for group in groups]
        fused = {parameter.device.type for parameter in parameters} <= {"cpu", "cuda", "mps"}  # as the core's adamw
        return torch.optim.AdamW(settings, lr=0.0, betas=o.betas, eps=o.eps, fused=fused)


def choose_optimizer(weights: int, memory: int, share: float) -> Literal["adamw", "adamw_8bit", "paged_adamw"]:
    """Return the optimizer whose state for so many weights fits into a share of so many bytes; 0 bytes: not known."""
    room = memory * share
    if not memory or weights * EXACT <= room:
        return "adamw"
    return "adamw_8bit" if weights * EIGHT_BITS <= room else "paged_adamw"


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory of a device, of a processor those that this process may use; 0 where nothing tells."""
    if device.type == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return 0
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *(limit for path in LIMITS if (limit := _read_limit(Path(path))))])


def _read_limit(path: Path) -> int:
    try:
        text = path.read_text("utf-8").strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0
