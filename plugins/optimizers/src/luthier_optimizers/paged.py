"""AdamW with its moments in a memory-mapped file: what is in use is in memory, the rest on the disk."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any, Final

import torch
from luthier import LuthierError
from torch import Tensor

from luthier_optimizers.stepper import State, Stepper, step_adamw

MOMENTS: Final = ("exp_avg", "exp_avg_sq")


class PagedStepper(Stepper):
    """AdamW that steps a weight in chunks. The moments of a chunk are read from their pages, and released."""

    def __init__(self, groups: list[dict[str, Any]], folder: str | None, chunk: int, **defaults: Any) -> None:
        self.folder, self.chunk = folder, chunk
        self.pages: dict[int, mmap.mmap] = {}  # by the address of the tensor on the pages
        super().__init__(groups, **defaults)

    def empty(self, weight: Tensor, group: dict[str, Any]) -> State:
        return {name: self._paged(weight.numel(), weight.dtype) for name in MOMENTS}

    def advance(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any]) -> None:
        self._take_in(state)
        flat = weight if weight.is_contiguous() else weight.contiguous()
        values, gradients = flat.view(-1), gradient.reshape(-1)
        for start in range(0, values.numel(), self.chunk):
            part = slice(start, start + self.chunk)
            moments = {name: state[name][part].to(weight.device) for name in MOMENTS}
            step_adamw(values[part], gradients[part], {"step": state["step"], **moments}, group)
            for name in MOMENTS:
                if moments[name].data_ptr() != state[name][part].data_ptr():
                    state[name][part].copy_(moments[name])
                self._let_go(state[name])
        if flat is not weight:
            weight.copy_(flat)

    def _take_in(self, state: State) -> None:
        """Move moments that a checkpoint brought onto pages."""
        for name in MOMENTS:
            if state[name].data_ptr() not in self.pages and type(state[name]) is Tensor:
                moment = state[name].reshape(-1)
                state[name] = self._paged(moment.numel(), moment.dtype)
                state[name].copy_(moment)

    def _let_go(self, tensor: Tensor) -> None:
        pages = self.pages.get(tensor.data_ptr()) if type(tensor) is Tensor else None
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)  # the map is shared, so they stay in the file

    def _paged(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return a tensor of zeros on pages of an unnamed file, which is deleted with the process."""
        if not count or type(torch.zeros(())) is not Tensor:  # in a rehearsal no tensor has values
            return torch.zeros(count, dtype=dtype)
        size = count * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                _reserve(file.fileno(), size)
                pages = mmap.mmap(file.fileno(), size)
        except OSError as error:
            remedy = "Set optimizer.folder to a disk that has room."
            where = self.folder or tempfile.gettempdir()
            problem = f"{size} bytes of optimizer state cannot be written: {error.strerror}"
            raise LuthierError("path-unwritable", problem, where=where, remedy=remedy) from error
        tensor = torch.frombuffer(pages, dtype=dtype)
        self.pages[tensor.data_ptr()] = pages
        return tensor


def _reserve(file: int, size: int) -> None:
    """Reserve the space on the disk, because a mapped file that cannot grow would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
