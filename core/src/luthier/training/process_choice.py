"""The choice of threads, float32 products and allocator for a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import torch

from luthier.hardware import allocator, threads
from luthier.hardware import matmul as products
from luthier.hardware.process_settings import Process
from luthier.precision.dtypes import hidden_size

if TYPE_CHECKING:
    from luthier.step.setup import Setup


OPTION: Final = "num_threads"


VARIABLE: Final = "OMP_NUM_THREADS"


def settle_process(setup: Setup, since: threads.Glance) -> Process:
    """Decide all of it; on other devices than a CPU there is nothing to decide but what the recipe asks for.

    What other programs did `since` then decides how many cores are free.
    """
    recipe, decisions = setup.recipe, setup.decisions
    if setup.device.type != "cpu":
        count = None if recipe.num_threads is None else decisions.explicit(OPTION, recipe.num_threads)
        return Process(threads=count)
    hidden, setting = hidden_size(setup.model), None
    if setup.precision.name == "float32":
        setting = decisions.take("float32_products", lambda: products.choose_matmul(hidden))
    return Process(
        threads=_threads(setup, hidden, since),
        float32_products=setting,
        keeps_memory=decisions.take("keeps_memory", lambda: allocator.choose_keeping(hidden)),
    )


def _threads(setup: Setup, hidden: int, since: threads.Glance) -> int:
    asked, decisions = setup.recipe.num_threads, setup.decisions
    if asked is not None:
        return decisions.explicit(OPTION, asked)
    if os.environ.get(VARIABLE):
        return decisions.explicit(OPTION, torch.get_num_threads(), f"{VARIABLE} is set")

    def chosen() -> tuple[int, str]:
        return threads.choose_threads(threads.count_cores(since), hidden, setup.world.local_size)

    most = len(threads.allowed_processors())
    return decisions.take(OPTION, chosen, usable=lambda count: count <= most)
