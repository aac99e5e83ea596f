"""The process while it trains: threads, float32 products and allocator, decided for the model and put back after it."""

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
        """Inside it the process is as the run wants it."""
        setting = self.float32_products or torch.get_float32_matmul_precision()
        with (
            threads.using_threads(self.threads),
            products.computed_by(setting),
            allocator.keeping_memory(self.keeps_memory),
        ):
            yield
