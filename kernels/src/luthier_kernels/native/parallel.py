"""Run a C function on as many threads as torch has, each on a part of the rows."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def run_parts(total: int, grain: int, call: Callable[[int, int], object]) -> None:
    """Call `call(start, end)` in parallel for parts that cover 0 to `total`, each at least `grain` long.

    Parts begin at multiples of `grain`, so that the result does not depend on the number of threads.
    ctypes lets other Python threads run while C computes.
    """
    threads = min(torch.get_num_threads(), -(-total // grain))
    if threads <= 1:
        if total:
            call(0, total)
        return
    size = -(-total // threads // grain) * grain
    parts = [(start, min(start + size, total)) for start in range(0, total, size)]
    waiting = [_pool(os.getpid(), threads).submit(call, *part) for part in parts[1:]]
    call(*parts[0])
    for one in waiting:
        one.result()


@functools.lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the workers of this process. They are made again after a fork, which copies no threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="luthier-kernels")
