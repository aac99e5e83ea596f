"""Meters of live tensor bytes: one counts storages that operations return, one reads torch's own allocator."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, UntypedStorage
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS: Final = "activations"  # the cause of a storage that was given no other


class Ledger:
    """A count of the bytes of living storages (`live`), and of the most at one time so far (`peak`).

    A storage counts until its last tensor is gone, under the cause that it was first counted with. `grain` is the size
    that each allocation is rounded up to: 512 bytes in torch's CUDA allocator.
    """

    def __init__(self, grain: int = 1) -> None:
        self.live = self.peak = 0
        self.at_peak: dict[str, int] = {}  # bytes by cause when the peak was reached
        self._grain = grain
        self._causes: dict[str, int] = defaultdict(int)
        self._held: dict[int, _Held] = {}  # by the storage's address

    def count(self, storage: UntypedStorage, cause: str = ACTIVATIONS) -> _Held:
        """Count a storage from now on, unless it counts already, and return its entry."""
        entry = self._held.get(storage._cdata)
        if entry is not None and entry.reference() is storage:
            return entry
        entry = self._hold(storage, cause)
        if self.live > self.peak:
            self.reset()
        return entry

    def blame(self, storages: Iterable[UntypedStorage], cause: str) -> None:
        """Count these storages under `cause`, even if they count under another already."""
        for storage in storages:
            entry = self.count(storage)
            self._causes[entry.cause] -= entry.size
            self._causes[cause] += entry.size
            entry.cause = cause

    def reset(self) -> None:
        """Restart the peak from the memory that is in use now."""
        self.peak, self.at_peak = self.live, dict(self._causes)

    def _hold(self, storage: UntypedStorage, cause: str) -> _Held:
        address, size = storage._cdata, -(-storage.nbytes() // self._grain) * self._grain
        entry = _Held(size, cause)

        def gone(_: object) -> None:
            self.live -= entry.size
            self._causes[entry.cause] -= entry.size
            if self._held.get(address) is entry:  # otherwise another storage has the same address by now
                del self._held[address]

        entry.reference = weakref.ref(storage, gone)
        self._held[address] = entry
        self.live += size
        self._causes[cause] += size
        return entry


class _Held:
    """The entry of one storage that counts."""

    __slots__ = ("cause", "reference", "size")
    reference: weakref.ref[UntypedStorage]

    def __init__(self, size: int, cause: str) -> None:
        self.size, self.cause = size, cause


class Meter(TorchDispatchMode):
    """A torch dispatch mode that counts every storage that an operation returns. Memory inside a kernel is not seen."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        super().__init__()
        self.ledger = ledger or Ledger()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.ledger.count(leaf.untyped_storage())
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch would import its compiler for this mode


class Allocations:
    """A context that measures what torch's CPU allocator gave: `peak` bytes above the beginning, kernels' scratch
    included.

    It reads the profiler's memory events, so compiled code counts too. It is for measurements, because it slows the
    run.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> Allocations:
        gc.collect()  # otherwise garbage of earlier code would be counted as freed by this code
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profiler.__exit__(*error)
        profiler: Any = self._profiler.profiler  # torch's stubs do not declare `kineto_results`
        events = profiler.kineto_results.events()
        allocations = [e for e in events if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
        live = 0
        for event in sorted(allocations, key=lambda e: e.start_ns()):
            live += event.nbytes()
            self.peak = max(self.peak, live)
