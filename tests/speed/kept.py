"""Activation memory of a step: what autograd keeps from the forward pass for the backward pass."""

from __future__ import annotations

from typing import Any


class Kept:
    """A count of the bytes that autograd keeps between `begin` and `end`, each storage once, without parameters.

    It is the same in every run, while the peak of resident memory counts libraries, optimizer states and the state of
    the allocator as well.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.sizes: dict[int, int] = {}
        self.hooks: Any = None

    def begin(self) -> None:
        """Count from here on, in this thread."""
        import torch

        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.hooks.__enter__()

    def end(self) -> None:
        """Count no more, and leave out what belongs to a parameter or a buffer."""
        if self.hooks is None:
            return
        self.hooks.__exit__(None, None, None)
        self.hooks = None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self.sizes.pop(tensor.untyped_storage().data_ptr(), None)

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    def _keep(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor
