"""The memory that a device has left: free GPU memory, or the least that the machine and its control groups allow."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

import attrs
import torch

PROC: Final = Path("/proc")
GROUPS: Final = Path("/sys/fs/cgroup")
ENDLESS: Final = 1 << 60  # version 1 of control groups writes a number like this if there is no limit


@attrs.frozen(kw_only=True)
class Capacity:
    """The memory of one device in bytes: all of it, and what is free for a run.

    `bound` says what limits the free bytes.
    """

    device: str
    total: int
    free: int
    bound: str


def measure_capacity(device: torch.device) -> Capacity:
    """Return the memory that `device` has now. Unused memory in torch's own cache counts as free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Capacity(device=str(device), total=total, free=free + unused, bound=torch.cuda.get_device_name(device))
    total, free = _machine()
    bounds = [(free, total, "this machine"), *_groups()]
    least, whole, bound = min(bounds)
    return Capacity(device=str(device), total=min(whole, total), free=max(least, 0), bound=bound)


def _machine() -> tuple[int, int]:
    """Return (total, available) bytes of the machine."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    if sys.platform == "linux" and (available := _meminfo("MemAvailable")):
        return total, available
    # macOS reports no available memory: it drops cached files and compresses pages, so free or all pages count
    return total, page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else total


def _meminfo(name: str) -> int | None:
    match = re.search(rf"^{name}:\s+(\d+) kB", _text(PROC / "meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _groups() -> list[tuple[int, int, str]]:
    """Return (free, limit, name) of every control group with a limit that this process is in, and of their parents."""
    groups = []
    for line in _text(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, used = (
            (GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else (GROUPS, "memory.max", "memory.current")
        )
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            groups += _group(place, limit, used)
    return groups


def _group(place: Path, limit: str, used: str) -> list[tuple[int, int, str]]:
    most, now = _text(place / limit).strip(), _text(place / used).strip()
    if not (most.isdigit() and now.isdigit()) or int(most) > ENDLESS:
        return []
    cached = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(place / "memory.stat"), re.MULTILINE)
    used_now = int(now) - (int(cached[1]) if cached else 0)  # the kernel gives inactive file pages back at once
    return [(int(most) - used_now, int(most), "the memory limit of its control group")]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
