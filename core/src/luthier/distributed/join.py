"""Joining the world: the backend that a recipe asks for, accepted or refused, and the device of each rank."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from luthier.distributed import store as notes
from luthier.distributed.orphans import follow_launcher
from luthier.distributed.world import World, is_lost
from luthier.errors import LuthierError
from luthier.logs import get_logger

if TYPE_CHECKING:
    from luthier.recipe.schema import Distributed

log = get_logger()
NEEDED: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MIXED: Final = "cpu:gloo,cuda:nccl"  # the run's numbers travel beside the gradients, without waiting for the GPU
LAUNCH: Final = "Start the run with `luthier train --nproc-per-node N`, or with torchrun."


def join_world(settings: Distributed, device: str = "auto") -> World:
    """Join the process group that a launcher's environment announces. A process without launcher is a world of one.

    `device` is the recipe's. A group that the caller's script has made is used as it is. Raises `distributed-setup` for
    an unavailable backend or an incomplete environment, and `distributed-lost` after `settings.timeout` seconds alone.
    """
    follow_launcher()
    world = World.current()
    _check_rank(world)
    if world.size == 1 or dist.is_initialized():
        if world.size == 1:
            _refuse_alone(settings, device)
        return world
    if device_type(device) == "cuda":
        torch.cuda.set_device(world.local_rank)
    _check_environment(world)
    backend, timeout = backend_for(settings.backend, device_type(device)), timedelta(seconds=settings.timeout)
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        # the launcher's store still holds the keys of an earlier start
        store = dist.PrefixStore(f"start/{world.restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        notes.keep_store(store)
    except (RuntimeError, ValueError) as error:
        code = "distributed-lost" if is_lost(error) else "distributed-setup"
        raise LuthierError(code, f"the processes did not find each other: {str(error).splitlines()[0]}") from error
    atexit.register(_leave)
    world = World.current()
    log.debug("joined", rank=world.rank, world_size=world.size, backend=world.backend)
    return world


def _check_rank(world: World) -> None:
    """Raise `distributed-setup` if the environment's rank is not below its world size."""
    if world.rank >= world.size:
        problem = f"RANK is {world.rank}, and WORLD_SIZE is {os.environ.get('WORLD_SIZE') or 'not set'}"
        remedy = f"Unset RANK. {LAUNCH}"
        raise LuthierError("distributed-setup", problem, where="environment", remedy=remedy)


def _check_environment(world: World) -> None:
    """Raise `distributed-setup` if a launcher has left out what processes need to find each other."""
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        problem = f"WORLD_SIZE is {world.size}, and {', '.join(missing)} not set"
        raise LuthierError("distributed-setup", problem, where="environment", remedy=LAUNCH)


def describe_launch(world: World) -> dict[str, Any]:
    """Return what a run's record says about its processes."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    return {"world_size": world.size, "backend": world.backend, "restarts": world.restarts, "launch": launch}


def backend_for(name: str, device: str) -> str:
    """Return torch's name for the recipe's `distributed.backend` on a type of device. Raises `distributed-setup`."""
    if name == "auto":
        return MIXED if device == "cuda" and dist.is_nccl_available() else "gloo"
    if name == "nccl":
        if device != "cuda":
            raise _refused(name, f"nccl moves the memory of CUDA devices, and this run is on {device}")
        if not dist.is_nccl_available():
            raise _refused(name, f"torch {torch.__version__} is built without it")
        return MIXED
    if not {"gloo": dist.is_gloo_available, "mpi": dist.is_mpi_available}[name]():
        raise _refused(name, f"torch {torch.__version__} is built without it")
    return name


def _refuse_alone(settings: Distributed, device: str) -> None:
    """Raise `distributed-setup` for options that only several processes read; the strategy is recorded anyway."""
    if settings.backend != "auto":
        backend_for(settings.backend, device_type(device))  # an impossible backend is reported first
    fields = {field.name: field.default for field in attrs.fields(type(settings)) if field.name != "strategy"}
    for name, default in fields.items():
        if getattr(settings, name) != default:
            problem, remedy = "nothing reads it: one process trains alone", f"Leave it out. {LAUNCH}"
            raise LuthierError("distributed-setup", problem, where=f"distributed.{name}", found=getattr(settings, name),
                               remedy=remedy)  # fmt: skip


def device_type(name: str) -> str:
    """Return cpu, cuda or mps, before anything is put on the device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name.partition(":")[0]


def device_name(name: str, world: World) -> str:
    """Return the device of this rank: `cuda:<local rank>` if the recipe says auto or cuda and the machine has it.

    Raises `recipe-conflict` for a single device that several ranks would share.
    """
    if world.size == 1:
        return name
    kind = device_type(name)
    if ":" in name or kind == "mps":
        problem = f"{world.size} processes cannot share the device {name}"
        raise LuthierError("recipe-conflict", problem, where="device", remedy="Write cuda, cpu or auto.")
    return f"cuda:{world.local_rank}" if kind == "cuda" else kind


def _refused(name: str, problem: str) -> LuthierError:
    here = [n for n, there in (("gloo", dist.is_gloo_available()), ("mpi", dist.is_mpi_available())) if there]
    here += ["nccl"] if dist.is_nccl_available() and torch.cuda.is_available() else []
    remedy = f"This machine has: auto, {', '.join(sorted(here))}."
    return LuthierError("distributed-setup", problem, where="distributed.backend", found=name, remedy=remedy)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
