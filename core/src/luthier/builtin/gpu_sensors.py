"""The instruments of NVIDIA's GPUs: NVML where its bindings are installed, else the program nvidia-smi."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

import attrs

from luthier.errors import LuthierError
from luthier.logs import get_logger

log = get_logger()
COMMAND: Final = "nvidia-smi"
QUERY: Final = ("--query-gpu=uuid,temperature.gpu,power.draw", "--format=csv,noheader,nounits")
PATIENCE: Final = 20.0  # seconds that one query may take


def find_sensor(uuids: Collection[str] = ()) -> Sensor:
    """Return the sensor of the GPUs with these ids, none: of all.

    Raises `dependency-missing` where neither NVML nor nvidia-smi is there.
    """
    try:
        import pynvml
    except ImportError:
        return NvidiaSmi(uuids)
    try:
        pynvml.nvmlInit()
        return Nvml(pynvml, uuids)
    except pynvml.NVMLError as error:  # for example bindings without a driver, or a lost GPU
        log.debug("NVML is not used", reason=str(error))
        return NvidiaSmi(uuids)


class Nvml:
    """NVML as the sensor: it is read in this process, in the moment in which it is asked."""

    def __init__(self, library: Any, uuids: Collection[str] = ()) -> None:
        self.library = library
        handles = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
        by_uuid = {str(library.nvmlDeviceGetUUID(handle)): handle for handle in handles}
        self.handles = {uuid: handle for uuid, handle in by_uuid.items() if not uuids or uuid in uuids}
        self.readings: list[Reading] | None = None  # None once they have been handed over

    def ask(self) -> None:
        self.readings = [self._reading(uuid, handle) for uuid, handle in self.handles.items()]

    def answer(self, *, wait: bool = False) -> list[Reading] | None:
        readings, self.readings = self.readings, None
        return readings

    def _reading(self, uuid: str, handle: Any) -> Reading:
        nvml = self.library
        temperature = self._told(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        power = self._told(nvml.nvmlDeviceGetPowerUsage, handle)  # in milliwatts
        return Reading(uuid=uuid, temperature=temperature, power=None if power is None else power / 1000)

    def _told(self, read: Callable[..., Any], *arguments: Any) -> float | None:
        """Return a number; None where this GPU does not tell it."""
        try:
            return float(read(*arguments))
        except self.library.NVMLError:
            return None


@attrs.frozen(kw_only=True)
class Reading:
    """One GPU at one moment: degrees Celsius and watts; None for what it does not tell."""

    uuid: str
    temperature: float | None
    power: float | None


class Sensor(Protocol):
    """The GPUs' instruments. `ask` begins a query, `answer` gives what it brought, or None while it is under way."""

    def ask(self) -> None: ...

    def answer(self, *, wait: bool = False) -> list[Reading] | None: ...


class NvidiaSmi:
    """`nvidia-smi` as the sensor: a query runs beside the training, which never waits for it unless it is paused."""

    def __init__(self, uuids: Collection[str] = ()) -> None:
        path = shutil.which(COMMAND)
        if path is None:
            remedy = "Install the NVIDIA driver's tools, or leave gpu_safety out."
            raise LuthierError("dependency-missing", f"{COMMAND} is not here", where="gpu_safety", remedy=remedy)
        self.command, self.uuids = [path, *QUERY], set(uuids)
        self.process: subprocess.Popen[str] | None = None

    def ask(self) -> None:
        if self.process is None:
            self.process = subprocess.Popen(self.command, text=True, stdout=subprocess.PIPE,
                                            stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)  # fmt: skip

    def answer(self, *, wait: bool = False) -> list[Reading] | None:
        process = self.process
        if process is None or (process.poll() is None and not wait):
            return None
        self.process = None
        try:
            text, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return []
        return [r for r in parse(text) if not self.uuids or r.uuid in self.uuids]


def parse(text: str) -> list[Reading]:
    """Parse the lines of nvidia-smi: `GPU-..., 54, 120.31`, with `[N/A]` for what a GPU does not report."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [Reading(uuid=row[0], temperature=_number(row[1]), power=_number(row[2])) for row in rows if len(row) == 3]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
