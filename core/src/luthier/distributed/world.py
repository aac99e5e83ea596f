"""The world: the processes that train one model together, and the messages that they exchange outside a step."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import attrs
import torch
import torch.distributed as dist

from luthier.distributed import store as notes
from luthier.errors import LuthierError

Value = TypeVar("Value")
MIXED: Final = "mixed torch.Tensor and DTensor"
NOISE: Final = re.compile(r"^\[\S+:\d+\]|This is typically caused.*$")
NETWORK: Final = ("gloo/transport", "Connection closed by peer", "Timed out waiting", "Connection reset by peer")


@attrs.frozen(kw_only=True)
class World:
    """A group of `size` processes, of which this one is `rank`; on its machine it is `local_rank` of `local_size`.

    Messages are plain JSON: numbers keep every bit, and nothing is unpickled. Every method except the properties is a
    collective: all ranks call it at the same place. A world of one answers at once. Raises `distributed-lost` if
    another process is gone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    backend: str = "none"  # the backend of collectives on this world's device
    restarts: int = 0  # how often the launcher has restarted the processes
    group: Any = None  # torch's process group; None: the default group

    @classmethod
    def current(cls) -> World:
        """Return this process's world: the process group it has joined, or the one in the launcher's environment."""
        joined = dist.is_available() and dist.is_initialized()
        rank, size = (
            (dist.get_rank(), dist.get_world_size()) if joined else (_number("RANK", 0), _number("WORLD_SIZE", 1))
        )
        return cls(
            rank=rank,
            size=size,
            local_rank=_number("LOCAL_RANK", rank if joined else 0),
            local_size=_number("LOCAL_WORLD_SIZE", size),
            backend=str(dist.get_backend()) if joined else "none",
            restarts=_number("TORCHELASTIC_RESTART_COUNT", 0),
        )

    @property
    def is_main(self) -> bool:
        """Return True if this process writes the run's folder, prints, and decides."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Return every rank's JSON value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        with lost_peers():
            return [json.loads(text) for text in _gathered(json.dumps(value).encode(), self)]

    def gather_numbers(self, numbers: Mapping[str, float]) -> list[dict[str, float]]:
        """Return every rank's numbers, in the order of ranks."""
        return self.gather(dict(numbers))

    def sum_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return each number summed over the ranks that have it, in float64 and in order of ranks: the same on all."""
        return add_numbers(self.gather_numbers(numbers))

    def any(self, flag: bool) -> bool:
        """Return True on every rank if the flag is True on any."""
        return any(self.gather(bool(flag)))

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's JSON value on every rank; the values of the others are ignored."""
        return self.gather(value if self.is_main else None)[0]  # type: ignore[return-value]

    def decide(self, work: Callable[[], Value]) -> Value:
        """Return on every rank the JSON value that `work` returns on rank 0. Its `LuthierError` is raised on every rank
        too.

        It may take hours: the others wait outside of the collective. A `decide` inside `work` joins no collective of
        its own.
        """
        if self.size == 1 or any(world.group is self.group for world in _deciding):
            return work()
        mine = self._decided(work) if self.is_main else {}
        notes.pass_on(self.is_main)
        answer = self.broadcast(mine)
        if "error" in answer:
            raise LuthierError(**answer["error"])
        return answer["value"]

    def _decided(self, work: Callable[[], Any]) -> dict[str, Any]:
        _deciding.append(self)
        try:
            return {"value": work()}
        except LuthierError as error:
            return {"error": error_attributes(error)}
        finally:
            _deciding.pop()

    def aside(self) -> World:
        """Return the same processes in a new group, so that two threads may communicate at the same time."""
        return self if self.size == 1 else attrs.evolve(self, group=dist.new_group(backend="gloo"))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)


def add_numbers(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the sums of numbers of the same name, added one after the other."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def error_attributes(error: LuthierError) -> dict[str, Any]:
    """Return the arguments that make the same error in another process."""
    attributes = error.to_dict()
    return {**{k: attributes[k] for k in ("code", "problem", "where", "found")}, "remedy": error.remedy}


@contextmanager
def lost_peers() -> Iterator[None]:
    """Raise the error of a collective as `distributed-lost` if another process is gone."""
    try:
        yield
    except RuntimeError as error:
        explained = explain_error(error)
        if explained is error:
            raise
        raise explained from error


def explain_error(error: BaseException) -> BaseException:
    """Return one of torch's errors about several processes in luthier's words; any other error unchanged."""
    if is_lost(error):
        return lost(error)
    if isinstance(error, RuntimeError) and MIXED in str(error):
        problem = "the adapter, the loss or the optimizer treats a shard of a weight as the whole weight"
        return LuthierError("part-unsupported", problem, where="distributed.strategy", found="fsdp",
                            remedy="Set distributed.strategy: ddp.")  # fmt: skip
    return error


def lost(error: BaseException) -> LuthierError:
    """Return `distributed-lost` for torch's error about a lost process, without torch's file, line and jokes."""
    reason = NOISE.sub("", str(error).splitlines()[0]).strip(" .")
    return LuthierError("distributed-lost", f"another process of the run is gone: {reason}")


def is_lost(error: BaseException) -> bool:
    """Return True if an error says that another process of the world is gone or silent."""
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError) if dist.is_available() else ()
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(n in str(error) for n in NETWORK))


_deciding: list[World] = []  # not empty while rank 0 decides and the others wait for the answer


def _gathered(text: bytes, world: World) -> list[bytes]:
    """Return the texts of all ranks. Lengths travel first, then the texts, padded to the longest."""
    device = wire_device(world.group)
    length = torch.tensor([len(text)], device=device)
    lengths = [torch.empty_like(length) for _ in range(world.size)]
    dist.all_gather(lengths, length, group=world.group)
    counts = [int(n) for n in lengths]
    filled = text.ljust(max(counts), b" ")
    mine = torch.frombuffer(bytearray(filled), dtype=torch.uint8).to(device)
    rows = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(rows, mine, group=world.group)
    return [bytes(row[:count].cpu().numpy()) for row, count in zip(rows, counts, strict=True)]


def wire_device(group: Any = None) -> torch.device:
    """Return the device that small tensors are sent from: the CPU, or the GPU if the group has no other backend."""
    on_cpu = "cpu" in dist.get_backend_config(group)
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else default
