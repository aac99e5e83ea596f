"""Layer inputs in host memory between forward and backward: copied beside the computation, fetched before their turn.

Pinned buffers are made once and used in every step; a layer ahead of the one at work is on its way back. The last
layer's input is needed at once and stays. After unsloth's and torchtune's offloading, with torch's own hooks.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol
from weakref import WeakSet

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from luthier.model.fake_tensors import Ghost

SMALLEST: Final = 2 << 20  # bytes: smaller tensors are not worth the copy


class Way(Protocol):
    """How tensors travel. What `send` and `fetch` return says when the copy is whole, to whoever needs it."""

    def buffer(self, tensor: Tensor) -> Tensor:
        """Room for one on the host."""

    def send(self, tensor: Tensor, buffer: Tensor) -> Any:
        """Begin to copy it there."""

    def fetch(self, buffer: Tensor, device: torch.device, sent: Any) -> tuple[Tensor, Any]:
        """Begin to copy it back, once it was `sent`."""

    def arrive(self, tensor: Tensor, fetched: Any) -> None:
        """Let what is computed next wait for it."""


class CudaWay:
    """Copies on a stream of their own, one after the other, from and to pinned memory."""

    def __init__(self) -> None:
        self._stream: Any = None

    def buffer(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def send(self, tensor: Tensor, buffer: Tensor) -> Any:
        stream = self._beside(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            buffer.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
            return stream.record_event()

    def fetch(self, buffer: Tensor, device: torch.device, sent: Any) -> tuple[Tensor, Any]:
        stream = self._beside(device)
        with torch.cuda.stream(stream):
            stream.wait_event(sent)
            return buffer.to(device, non_blocking=True), stream.record_event()

    def arrive(self, tensor: Tensor, fetched: Any) -> None:
        current = torch.cuda.current_stream(tensor.device)
        current.wait_event(fetched)
        tensor.record_stream(current)

    def _beside(self, device: torch.device) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


@attrs.define(eq=False)
class Away:
    """One tensor on the host; `back` once it is on its way from there."""

    number: int
    buffer: Tensor
    device: torch.device
    sent: Any
    back: tuple[Tensor, Any] | None = None


@attrs.frozen
class Imagined:
    """The place of a tensor without data, in a rehearsal: only its room on the device matters."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class HostMemory:
    """`saving(number)` goes around layer `number`; the layer `resident` keeps its input where it is."""

    def __init__(self, resident: int, way: Way, smallest: int = SMALLEST) -> None:
        self.resident, self.way, self.smallest = resident, way, smallest
        self._free: dict[Any, list[Tensor]] = defaultdict(list)
        # a graph that nobody differentiates removes its own entries
        self._away: dict[int, WeakSet[Away]] = defaultdict(WeakSet)

    def saving(self, number: int) -> AbstractContextManager[Any]:
        """Move what autograd keeps to host memory within this context; it comes back when it is needed."""
        return saved_tensors_hooks(lambda tensor: self._send(tensor, number), self._take)

    def _send(self, tensor: Tensor, number: int) -> Tensor | Away | Imagined:
        small = tensor.numel() * tensor.element_size() < self.smallest
        if small or number == self.resident or not tensor.is_floating_point():
            return tensor
        if isinstance(tensor, Ghost):
            return Imagined(tensor.shape, tensor.dtype, tensor.device)
        free = self._free[_kind(tensor)]
        buffer = free.pop() if free else self.way.buffer(tensor)
        away = Away(number, buffer, tensor.device, self.way.send(tensor.detach(), buffer))
        self._away[number].add(away)
        return away

    def _take(self, saved: Tensor | Away | Imagined) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if isinstance(saved, Imagined):
            return torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
        tensor, fetched = self._fetched(saved)
        for earlier in self._away[saved.number - 1]:
            self._fetched(earlier)
        self.way.arrive(tensor, fetched)
        self._away[saved.number].discard(saved)
        self._free[_kind(saved.buffer)].append(saved.buffer)  # copies are ordered, so the next one waits for this one
        return tensor

    def _fetched(self, away: Away) -> tuple[Tensor, Any]:
        if away.back is None:
            away.back = self.way.fetch(away.buffer, away.device, away.sent)
        return away.back


def _kind(tensor: Tensor) -> Any:
    return tuple(tensor.shape), tensor.dtype
