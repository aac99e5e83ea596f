"""Initial weights: what trains, as it was before the first step, put in place for a while as the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.model.weights.shard_tensors import is_shard, own_shard, take_rows, whole_tensor

Place = tuple[str, nn.Module, str]  # the full name, and the module and attribute at which shards may replace the tensor


class InitialWeights:
    """Copies of the parameters that train, and of the buffers in the adapter's state, made when it is built.

    On a sharded model each rank keeps its shards. A run keeps them as constants.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        self.device: torch.device = next(model.parameters()).device
        self._places = list(_places(model, {t.data_ptr() for t in _tensors(state) if _has_data(t)}))
        self.kept: dict[str, Tensor] = {}
        self.capture()

    def capture(self) -> None:
        """Copy the weights as they are now."""
        for name, module, key in self._places:
            self.kept.pop(name, None)  # first, so that two copies of all weights are held at no time
            self.kept[name] = getattr(module, key).detach().clone()

    def constants(self) -> Mapping[str, Tensor]:
        """Return the weights by name."""
        return self.kept

    @torch.no_grad()
    def load_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Take what `constants` returned when the run began."""
        for name, parameter in self.kept.items():
            given = constants[name].to(own_shard(parameter).device)
            own_shard(parameter).copy_(take_rows(given, parameter))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model compute with its initial weights within this context; tensors saved by autograd are not
        touched.
        """
        undo = [_exchanged(getattr(module, key), self.kept[name]) for name, module, key in self._places]
        self._settle()
        try:
            yield
        finally:
            for restore in undo:
                restore()
            self._settle()

    def _settle(self) -> None:
        """Let nothing that was made of the other weights be used: casts of them, or copies on their way to ranks."""
        torch.clear_autocast_cache()
        if self.device.type == "cuda" and any(is_shard(tensor) for tensor in self.kept.values()):
            torch.cuda.synchronize(self.device)  # FSDP2 gathers shards on a stream of its own


def _places(model: nn.Module, states: set[int]) -> Iterator[Place]:
    """Return where each parameter that trains stands, once, and each buffer whose memory is among `states`."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        buffers = [(n, b) for n, b in module.named_buffers(recurse=False) if _has_data(b) and b.data_ptr() in states]
        trained = [(n, p) for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        for key, tensor in (*trained, *buffers):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{key}" if path else key, module, key


def _exchanged(tensor: Tensor, value: Tensor) -> Callable[[], None]:
    """Put the kept values into a tensor, and return what puts its own back."""
    if not _has_data(tensor):
        return lambda: None
    if is_shard(tensor):  # FSDP2 knows the shard's memory, so the contents of the two are swapped
        _swap_values(own_shard(tensor), own_shard(value))
        return lambda: _swap_values(own_shard(tensor), own_shard(value))
    before = tensor.data
    tensor.data = whole_tensor(value).to(before.dtype)

    def restore() -> None:
        tensor.data = before

    return restore


def _swap_values(one: Tensor, other: Tensor) -> None:
    """Exchange the values of two tensors, unseen by autograd."""
    values = one.data.clone()
    one.data.copy_(other.data)
    other.data.copy_(values)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield own_shard(tree)
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def _has_data(tensor: Tensor) -> bool:
    """Return True if a tensor has numbers: those of a rehearsal, and on meta, have none."""
    return not (tensor.is_meta or getattr(tensor, "has_no_data", False))
