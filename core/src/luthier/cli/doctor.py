"""`luthier doctor`: versions, devices, threads, memory, disk, plugins, and what is wrong with any of them."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.screen.answers import INSTALL_LOCAL, Answer
from luthier.cli.screen.flags import Json

if TYPE_CHECKING:
    from rich.console import Console

BESIDE = ("peft", "accelerate", "bitsandbytes", "triton", "typer", "rich", "pluggy", "attrs", "cattrs")
GIB = 2**30


def doctor(json: Json = False) -> Any:
    """Print versions, devices, memory, plugins and failures.

    The exit status is always 0; scripts use `luthier plugins --check`.
    """
    document = examine()
    return Answer(document=document, view=lambda screen: _draw(screen, document))


def examine() -> dict[str, Any]:
    """Return all that the doctor finds. It imports torch, if installed, for devices and threads only."""
    from luthier.cli.screen.part_listing import checked_rows
    from luthier.plugins.requirements import of_extra

    rows, local = checked_rows(), of_extra("luthier", "local")
    missing = [name for name in local if _version(name) is None]
    torch, complaint = _torch()
    distributions = {row.distribution: row.version for row in rows}
    return {
        "versions": {"python": platform.python_version(), **_versions(local), **distributions},
        "platform": platform.platform(),
        "python": sys.executable,
        "devices": [{"device": "cpu", "name": _processor()}, *(_accelerators(torch) if torch else ())],
        "threads": _threads(torch),
        "memory": _memory(),
        "disk": _disk(Path.cwd()),
        "plugins": {
            "parts": sum(row.kind is not None for row in rows),
            "distributions": len(distributions),
            "blocked": sorted(row.name for row in rows if row.state == "blocked"),
        },
        "failures": [*complaint, *(f"{row}: {row.reason}" for row in rows if row.fails)],
        "missing": missing,
        "remedy": f"For all of local training: {INSTALL_LOCAL}" if missing else None,
    }


def _versions(local: list[str]) -> dict[str, str]:
    versions = {name: _version(name) for name in ("luthier", *local, *BESIDE)}
    return {name: version for name, version in versions.items() if version}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> tuple[Any, list[str]]:
    """Return torch (None if it is missing), and its error messages if it cannot be imported."""
    if importlib.util.find_spec("torch") is None:
        return None, []
    try:
        import torch
    except (ImportError, OSError) as error:  # a missing system library is an OSError
        return None, [f"torch cannot be imported: {error}"]
    return torch, []


def _accelerators(torch: Any) -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        capability, memory = f"{device.major}.{device.minor}", device.total_memory
        devices.append(
            {"device": f"cuda:{index}", "name": device.name, "memory_bytes": memory, "capability": capability}
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU"})
    return devices


def _processor() -> str:
    """Return the processor's own name if the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _threads(torch: Any) -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads: dict[str, Any] = {"cpus": os.cpu_count(), "usable": usable}
    if torch:
        threads["torch"] = torch.get_num_threads()
    return threads | {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}


def _memory() -> dict[str, int] | None:
    """Return the bytes of main memory, total and available; None if the system does not say."""
    if importlib.util.find_spec("psutil") is not None:
        import psutil

        memory = psutil.virtual_memory()
        return {"total_bytes": memory.total, "available_bytes": memory.available}
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return {
            "total_bytes": page * os.sysconf("SC_PHYS_PAGES"),
            "available_bytes": page * os.sysconf("SC_AVPHYS_PAGES"),
        }
    except (ValueError, OSError, AttributeError):
        return None


def _disk(folder: Path) -> dict[str, Any]:
    usage = shutil.disk_usage(folder)
    return {"folder": str(folder), "total_bytes": usage.total, "free_bytes": usage.free}


def _draw(screen: Console, report: dict[str, Any]) -> None:
    from rich.text import Text

    from luthier.cli.screen.tables import pairs_table

    screen.print(pairs_table(dict(_lines(report))))
    for failure in report["failures"]:
        screen.print(Text(f"failure: {failure}", style="red"), soft_wrap=True)
    if not report["failures"]:
        screen.print(Text("no failures", style="green"))


def _lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "versions", " ".join(f"{name}={version}" for name, version in report["versions"].items())
    yield "platform", report["platform"]
    yield "python", report["python"]
    for device in report["devices"]:
        memory = f", {device['memory_bytes'] / GIB:.1f} GiB" if "memory_bytes" in device else ""
        yield device["device"], f"{device['name']}{memory}"
    yield "threads", ", ".join(f"{name} {value}" for name, value in report["threads"].items())
    if report["memory"]:
        available, total = (report["memory"][key] / GIB for key in ("available_bytes", "total_bytes"))
        yield "memory", f"{available:.1f} of {total:.1f} GiB available"
    yield "disk", f"{report['disk']['free_bytes'] / GIB:.1f} GiB free in {report['disk']['folder']}"
    counts = report["plugins"]
    blocked = f"; blocked: {', '.join(counts['blocked'])}" if counts["blocked"] else ""
    yield "plugins", f"{counts['parts']} parts of {counts['distributions']} distributions{blocked}"
    lacking = f"lacks {', '.join(report['missing'])}. {report['remedy']}"
    yield "training", lacking if report["missing"] else "all that it needs here is installed"
