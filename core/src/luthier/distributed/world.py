"""The world: the processes that train one model together, and the little that they tell each other outside a step."""

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
    """`size` processes, of which this one is `rank`; `local_rank` of `local_size` on its machine.

    What is told is plain JSON: numbers keep every bit, and nothing is unpickled. Every method but the properties is
    collective: all ranks call it at the same place. A world of one answers at once. Raises `distributed-lost` where
    another process is gone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    backend: str = "none"  # of the collectives on this world's device
    restarts: int = 0  # how often the launcher has begun anew
    group: Any = None  # torch's process group; None: the one that everybody has joined

    @classmethod
    def current(cls) -> World:
        """This process's world: the process group it has joined, or what a launcher's environment says it will."""
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
        """True if this process writes the run's folder, prints, and decides."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Every rank's JSON value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        with lost_peers():
            return [json.loads(text) for text in _gathered(json.dumps(value).encode(), self)]

    def gather_numbers(self, numbers: Mapping[str, float]) -> list[dict[str, float]]:
        """Every rank's numbers, in the order of ranks."""
        return self.gather(dict(numbers))

    def sum_numbers(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Each number summed over the ranks that have it, in float64 and in the order of ranks: the same everywhere."""
        return add_numbers(self.gather_numbers(numbers))

    def any(self, flag: bool) -> bool:
        """Return True if it is so on any rank."""
        return any(self.gather(bool(flag)))

    def broadcast(self, value: Value) -> Value:
        """Rank 0's JSON value; the others' is not looked at."""
        return self.gather(value if self.is_main else None)[0]  # type: ignore[return-value]

    def decide(self, work: Callable[[], Value]) -> Value:
        """What `work` gives on rank 0, a JSON value, on every rank; its `LuthierError` is raised on every rank too.

        It may take hours: the others wait outside of the collective. What `work` itself lets rank 0 decide is told
        with it.
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
        """The same processes in a group of their own, so that another thread may talk while this one does."""
        return self if self.size == 1 else attrs.evolve(self, group=dist.new_group(backend="gloo"))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)


def add_numbers(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Numbers of the same name summed, one after the other."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def error_attributes(error: LuthierError) -> dict[str, Any]:
    """Return what makes the same error in another process."""
    attributes = error.to_dict()
    return {**{k: attributes[k] for k in ("code", "problem", "where", "found")}, "remedy": error.remedy}


@contextmanager
def lost_peers() -> Iterator[None]:
    """What a collective raises when another process is gone, as `distributed-lost`."""
    try:
        yield
    except RuntimeError as error:
        explained = explain_error(error)
        if explained is error:
            raise
        raise explained from error


def explain_error(error: BaseException) -> BaseException:
    """An error of torch's about several processes in our words; any other as it is."""
    if is_lost(error):
        return lost(error)
    if isinstance(error, RuntimeError) and MIXED in str(error):
        problem = "the adapter, the loss or the optimizer computes with a part of a weight as if it were all of it"
        return LuthierError("part-unsupported", problem, where="distributed.strategy", found="fsdp",
                            remedy="Set distributed.strategy: ddp.")  # fmt: skip
    return error


def lost(error: BaseException) -> LuthierError:
    """Return what torch says of a peer that is gone, without its file, its line and its jokes."""
    reason = NOISE.sub("", str(error).splitlines()[0]).strip(" .")
    return LuthierError("distributed-lost", f"another process of the run is gone: {reason}")


def is_lost(error: BaseException) -> bool:
    """Return True if an error says that another process of the world is gone or silent."""
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError) if dist.is_available() else ()
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(n in str(error) for n in NETWORK))


_deciding: list[World] = []  # rank 0 is at it, and the others wait for the answer


def _gathered(text: bytes, world: World) -> list[bytes]:
    """Texts of all ranks: their lengths first, then the texts, filled up to the longest."""
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
    """Return where small tensors travel from: the CPU, or the GPU where the group has nothing else."""
    on_cpu = "cpu" in dist.get_backend_config(group)
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else default
