"""The number of compute threads on a CPU: the physical cores that this process may use and nobody else works on."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import attrs
import psutil
import torch

WIDE_ENOUGH: Final = 256  # the hidden size from which a second thread gains more than the synchronization costs
WATCHED: Final = 0.2  # seconds: over a shorter time the processors' counters say nothing
SYSTEM: Final = Path("/sys")
PROC: Final = Path("/proc")
# the kernel counts guests' time in "user" and "nice" already
WORKING: Final = ("user", "nice", "system", "irq", "softirq", "steal")


@attrs.frozen(kw_only=True)
class Cores:
    """The cores of a machine.

    `busy` is the share, 0 to 1, that other processes take; `quota` is in cores, None: no limit.
    """

    physical: int
    quota: float | None = None
    busy: float = 0.0


def choose_threads(cores: Cores, hidden: int, ranks: int = 1) -> tuple[int, str]:
    """Return a number of threads and the reason for it. `ranks` processes of the run share the machine.

    Two hyperthreads of a core share its arithmetic units. Threads that wait for one which another process has preempted
    lose far more than they bring: measured on two shared cores, 2 threads took up to 7 times as long as 1.
    """
    if hidden < WIDE_ENOUGH:
        return 1, f"products of hidden size {hidden}, less than {WIDE_ENOUGH}, are too short to share"
    free = round(cores.physical * (1.0 - cores.busy))
    bounds = [(free, f"{_counted(cores.physical)}{_taken(cores)}")]
    if cores.quota is not None:
        bounds.append((math.floor(cores.quota), f"the control group allows {cores.quota:g}"))
    count, reason = min(bounds)
    if ranks > 1:
        count, reason = count // ranks, f"{reason}, shared by {ranks} processes"
    return max(count, 1), reason


def _counted(physical: int) -> str:
    return "1 physical core" if physical == 1 else f"{physical} physical cores"


def _taken(cores: Cores) -> str:
    return f", {cores.busy:.0%} of them taken by other processes" if cores.busy >= 0.05 else ""


@attrs.frozen(kw_only=True)
class Glance:
    """The counters of this process's processors at one moment: seconds of work by all processes and by this one."""

    at: float = attrs.field(factory=time.monotonic)
    worked: float = attrs.field(factory=lambda: _worked(allowed_processors()))
    ours: float = attrs.field(factory=lambda: sum(os.times()[:4]))

    def busy(self) -> float:
        """Return the share of the time since this moment that other processes took; 0 if it is not known."""
        now = Glance()
        passed = (now.at - self.at) * len(allowed_processors())
        if now.at - self.at < WATCHED or not now.worked:
            return 0.0
        return min(max((now.worked - self.worked) - (now.ours - self.ours), 0.0) / passed, 1.0)


def count_cores(since: Glance) -> Cores:
    """Return the cores of this machine; `busy` is the share that other processes have taken since `since`."""
    return Cores(physical=physical_cores(allowed_processors()), quota=quota(), busy=since.busy())


def physical_cores(numbers: list[int]) -> int:
    """Return how many physical cores these logical processors are. If the system does not say, psutil counts them."""
    siblings = {_text(SYSTEM / f"devices/system/cpu/cpu{n}/topology/thread_siblings_list").strip() for n in numbers}
    if all(siblings):
        return len(siblings)
    return min(len(numbers), psutil.cpu_count(logical=False) or len(numbers))


def allowed_processors() -> list[int]:
    """Return the numbers of the logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def quota(proc: Path = PROC, system: Path = SYSTEM) -> float | None:
    """Return the cores' worth of time that this process's control groups allow, parents included; None: no limit."""
    shares = [_share(folder) for folder in _group_folders(proc, system)]
    return min((share for share in shares if share is not None), default=None)


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads within this context; None leaves it unchanged."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _worked(numbers: list[int]) -> float:
    """Return the seconds since boot that these processors were busy, added up."""
    each = psutil.cpu_times(percpu=True)
    busy = [sum(getattr(each[n], name, 0.0) for name in WORKING) for n in numbers if n < len(each)]
    return float(sum(busy))


def _group_folders(proc: Path, system: Path) -> Iterator[Path]:
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            continue
        root = system / "fs/cgroup" / (controllers and "cpu")
        folder = root / path.lstrip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(root))


def _share(folder: Path) -> float | None:
    """Return the cores' worth of time that one control group allows: `cpu.max`, or quota / period in version 1."""
    with suppress(ValueError, ZeroDivisionError):
        if text := _text(folder / "cpu.max"):
            given, period = text.split()
            return None if given == "max" else float(given) / float(period)
        quota = float(_text(folder / "cpu.cfs_quota_us"))
        return None if quota < 0 else quota / float(_text(folder / "cpu.cfs_period_us"))
    return None


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text("utf-8", "replace")
    return ""
