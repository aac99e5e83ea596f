"""Process-wide settings while a run trains: threads, float32 products and allocator, restored after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import torch

from luthier.hardware import allocator, threads
from luthier.hardware import matmul as products


@attrs.frozen(kw_only=True)
class Process:
    """The process-wide settings of a run: threads, float32 products, allocator. None leaves one as it is."""

    threads: int | None = None
    float32_products: str | None = None
    keeps_memory: bool = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the settings within this context, and restore the process after it."""
        setting = self.float32_products or torch.get_float32_matmul_precision()
        with (
            threads.using_threads(self.threads),
            products.computed_by(setting),
            allocator.keeping_memory(self.keeps_memory),
        ):
            yield
