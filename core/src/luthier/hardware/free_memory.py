"""What a device can still give: free GPU memory, or the least of what the machine and its control groups allow."""

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
ENDLESS: Final = 1 << 60  # version 1 writes a number like this for no limit


@attrs.frozen(kw_only=True)
class Capacity:
    """Bytes of one device: all of it, and what is free for a run; `bound` says what the free bytes are limited by."""

    device: str
    total: int
    free: int
    bound: str


def measure_capacity(device: torch.device) -> Capacity:
    """Return what `device` has now; what torch's own cache holds unused counts as free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Capacity(device=str(device), total=total, free=free + unused, bound=torch.cuda.get_device_name(device))
    total, free = _machine()
    bounds = [(free, total, "this machine"), *_groups()]
    least, whole, bound = min(bounds)
    return Capacity(device=str(device), total=min(whole, total), free=max(least, 0), bound=bound)


def _machine() -> tuple[int, int]:
    """(total, available) bytes of the machine."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    if sys.platform == "linux" and (held := _meminfo("MemAvailable")):
        return total, held
    # macOS has no such number: it gives back cached files and compresses, so what is there counts
    return total, page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else total


def _meminfo(name: str) -> int | None:
    match = re.search(rf"^{name}:\s+(\d+) kB", _text(PROC / "meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _groups() -> list[tuple[int, int, str]]:
    """(free, limit, name) of every control group with a limit that this process is in, its parents' too."""
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
    held = int(now) - (int(cached[1]) if cached else 0)  # file pages that the kernel gives back at once
    return [(int(most) - held, int(most), "the memory limit of its control group")]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
