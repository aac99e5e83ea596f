"""Ghosts: tensors with shape, dtype and device and no data, so that a step can be tried without its memory.

Torch's own `FakeTensorMode` (2.13) does not carry this: integers have no values in it, so that the first `nonzero`
over the supervised tokens ends a step, with a `ShapeEnv` too. Here integers stay real.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import ge, gt
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from luthier.hardware.memory_meter import ACTIVATIONS, Ledger
from luthier.torch_operators import is_pure, makes_tensor, written_argument

Piece = TypeVar("Piece")
META: Final = torch.device("meta")
HEAD: Final = "head"
BATCH: Final = "batch"
REAL: Final = 1 << 18  # integer tensors of up to so many elements are computed, larger ones are fake


class Ghost(Tensor):
    """A tensor that claims to be on a device, and is a meta tensor inside.

    `has_no_data` is for code that distinguishes tensors by type: a ghost stands for a plain tensor.
    """

    inner: Tensor  # type: ignore[assignment]  # torch's `inner` product is not asked of a ghost
    world: Ghosts
    has_no_data = True
    truth = False  # its value where Python asks for a boolean

    @staticmethod
    def __new__(cls: type[Ghost], inner: Tensor, device: torch.device, world: Ghosts) -> Ghost:
        made = Tensor._make_wrapper_subclass(cls, inner.size(), strides=inner.stride(), dtype=inner.dtype,
                                             storage_offset=inner.storage_offset(), device=device)  # fmt: skip
        made.inner, made.world = inner, world
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own subclasses

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        return next(_ghosts((*args, *kwargs.values()))).world.call(func, args, kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """With the next method this lets `module.to` swap parameters instead of setting their data."""
        return ["inner"], (self.device, self.world)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> Ghost:
        return Ghost(inner["inner"], *meta)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()  # views of one fake tensor share its storage

    def tolist(self) -> Any:
        number: Any = self.new_empty(()).item()
        return functools.reduce(lambda made, size: [copy.copy(made) for _ in range(size)], self.shape[::-1], number)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch has it untyped
        return f"Ghost({list(self.shape)}, {self.dtype}, {self.device})"


class Ghosts(TorchDispatchMode):
    """A dispatch mode in which new floating tensors are ghosts, and so are the results of operations on ghosts.

    Integer tensors stay real, so that document positions are computed as in a run, and so do tables of values
    (`TABLES`), from which parts make codebooks. A ghost gives Python the number 1, and the truth value False unless it
    compares a single number, taken as 1: a layer that runs if `torch.rand(1) > dropout` does run. Its nonzero entries
    are those of balanced experts: all of a vector, every `experts`-th of a table. `ledger` counts what is on `device`:
    ghosts with rows as long as the `vocabulary` as the head's, real integers as the batch's. `flops` counts products
    and attention. Of similar pieces of work one stands for all, unless `shortened` is False.
    """

    def __init__(
        self, ledger: Ledger, device: torch.device, *, experts: int = 1, vocabulary: int = 0, shortened: bool = True
    ) -> None:
        super().__init__()
        self.ledger, self.experts, self.flops, self.shortened = ledger, max(experts, 1), 0, shortened
        self._kind, self._vocabulary = device.type, vocabulary
        self._known: dict[Any, tuple[Any, ...]] = {}  # by operation and inputs, because layers repeat themselves

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if Ghost in types:
            return self.call(func, args, kwargs)
        if makes_tensor(func):
            inner = func(*args, **(kwargs | {"device": META}))
            if (inner.dtype.is_floating_point and func not in TABLES) or inner.numel() > REAL:
                return self._wrapped(inner, torch.device(kwargs.get("device") or "cpu"))
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == self._kind:
                self.ledger.count(leaf.untyped_storage(), ACTIVATIONS if leaf.dtype is torch.bool else BATCH)
        return out

    def copy(self, model: Any) -> Any:
        """Return the ghost of a model that is loaded, on its devices."""
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, {key: self._like(t) for key, t in tensors.items() if t.is_floating_point()})

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation with ghosts among its arguments."""
        special = SPECIAL.get(func)
        if special is not None:
            return special(self, *args, **kwargs)
        if not func._schema.returns:  # as fused optimizers, not all of which have a meta kernel
            return None
        out = self._answer(func, args, kwargs)
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            self.flops += counted(*args, **kwargs, out_val=out)
        return out

    def _answer(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return what the operation returns; what one without views returned for inputs like these is remembered."""
        written = written_argument(func)
        if written is None and not is_pure(func):
            return self._run(func, args, kwargs)
        key = (func, _signature(args), _signature(tuple(kwargs.items())) if kwargs else None)
        try:
            known = self._known.get(key)
        except TypeError:  # an argument cannot be hashed
            return self._run(func, args, kwargs)
        if written is not None:
            if known is None:
                self._run(func, args, kwargs)
                self._known[key] = ()
            place, name = written
            return args[place] if place < len(args) else kwargs[name]
        if known is None:
            out = self._run(func, args, kwargs)
            if isinstance(out, Ghost):
                self._known[key] = (out.size(), out.stride(), out.dtype, out.device)
            return out
        size, stride, dtype, device = known
        return self._wrapped(torch.empty_strided(size, stride, dtype=dtype, device=META), device)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the operation on meta tensors. Results become ghosts; arguments that it changed come back as given."""
        given: dict[int, Any] = {}
        inputs, named = _plain(args, given), _plain(kwargs, given)
        device = next(_ghosts((*args, *kwargs.values()))).device
        if named.get("device") is not None:
            device, named["device"] = torch.device(named["device"]), META
        out = func(*inputs, **named)
        return self._back(out, device, given)

    def _back(self, out: Any, device: torch.device, given: dict[int, Any]) -> Any:
        if isinstance(out, Tensor):
            return given[id(out)] if id(out) in given else self._wrapped(out, device)
        if isinstance(out, (list, tuple)):
            return type(out)(self._back(o, device, given) for o in out)
        return out

    def _wrapped(self, inner: Tensor, device: torch.device) -> Ghost:
        assert not isinstance(inner, Ghost)
        if device.type == self._kind:
            wide = inner.dim() > 0 and inner.shape[-1] == self._vocabulary
            self.ledger.count(inner.untyped_storage(), HEAD if wide else ACTIVATIONS)
        return Ghost(inner, device, self)

    def _like(self, tensor: Tensor) -> Tensor:
        with _disable_current_modes():  # within this mode the memory would be a ghost itself, and its ghost one of two
            inner = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)
        ghost = self._wrapped(inner, tensor.device)
        return nn.Parameter(ghost, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else ghost

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch would import its compiler for this mode


def is_ghost(tensor: Tensor) -> bool:
    return isinstance(tensor, Ghost)


def is_shortened(tensor: Tensor) -> bool:
    """Return True if one piece of the work on this tensor stands for all."""
    return isinstance(tensor, Ghost) and bool(tensor.world.shortened)


def standing_for(tensor: Tensor, pieces: Sequence[Piece], size: Callable[[Piece], int]) -> Iterator[Piece]:
    """Yield successive pieces of work on `tensor` in the same memory; of a ghost the largest, counted for all."""
    if not isinstance(tensor, Ghost) or not tensor.world.shortened or not pieces:
        yield from pieces
        return
    world, largest = tensor.world, max(pieces, key=size)
    before = world.flops
    yield largest
    world.flops = before + (world.flops - before) * sum(map(size, pieces)) // size(largest)


def tensor_storages(tensors: Iterable[Tensor]) -> list[Any]:
    """Return what the ledger knows these tensors by."""
    return [(t.inner if isinstance(t, Ghost) else t).untyped_storage() for t in tensors]


def _ghosts(values: Any) -> Any:
    for value in values:
        if isinstance(value, Ghost):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _ghosts(value)


def _plain(value: Any, given: dict[int, Any]) -> Any:
    """Return the value with meta tensors instead of all tensors; `given` maps their ids to the originals."""
    if isinstance(value, Tensor):
        inner = value.inner if isinstance(value, Ghost) else value.to(META)
        given[id(inner)] = value
        return inner
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(v, given) for v in value])
    return {k: _plain(v, given) for k, v in value.items()} if isinstance(value, dict) else value


def _signature(value: Any) -> Any:
    """Return what an operation's result depends on."""
    if isinstance(value, Tensor):
        return (value.size(), value.stride(), value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return tuple([_signature(v) for v in value])
    return (type(value), value)


def _number(world: Ghosts, tensor: Ghost) -> bool | int | float:
    return tensor.truth if tensor.dtype is torch.bool else 1.0 if tensor.dtype.is_floating_point else 1


def _compared(operator: Any, holds: Callable[[float, Any], bool]) -> Callable[..., Ghost]:
    """Return a comparison with a number: a ghost, which is true if 1 fulfils it in the place of a single number."""

    def compare(world: Ghosts, tensor: Tensor, bound: Any) -> Ghost:
        made: Ghost = world._answer(operator, (tensor, bound), {})
        made.truth = tensor.numel() == 1 and holds(1.0, bound)
        return made

    return compare


def _places(world: Ghosts, mask: Tensor) -> Tensor:
    """Return [n, dimensions] int64, real: where a mask without data counts as set."""
    every = 1 if mask.dim() < 2 else world.experts
    flat = torch.arange(0, mask.numel(), every, device=mask.device)
    return torch.stack(torch.unravel_index(flat, mask.shape), -1)


def _index(world: Ghosts, tensor: Tensor, indices: Any) -> Any:
    positions: list[Tensor | None] = []
    for index in indices:
        masks = isinstance(index, Ghost) and index.dtype in (torch.bool, torch.uint8)
        positions += _places(world, index).unbind(1) if masks else [index]
    if not any(isinstance(given, Ghost) for given in (tensor, *positions)):  # only the mask was one
        return aten.index.Tensor(tensor, positions)
    return world._run(aten.index.Tensor, (tensor, positions), {})


def _grouped(world: Ghosts, a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Ghost:
    """Return a ghost with the shape of torch's `_grouped_mm`, whose meta kernel supports bfloat16 only."""
    groups = () if offs is None else (offs.shape[0],)
    stacked = (groups or (a.shape[0],)) if a.dim() == b.dim() else ()
    shape = (*stacked, a.shape[-2], b.shape[-1])
    parted = groups[0] if groups and stacked else 1  # the groups divide the dimension that is summed over
    world.flops += 2 * math.prod(shape) * a.shape[-1] // parted
    return world._wrapped(torch.empty(shape, dtype=a.dtype, device=META), a.device)


aten = torch.ops.aten
PACKETS = (aten.arange, aten.eye, aten.linspace, aten.logspace)
TABLES: Final = frozenset(getattr(p, name) for p in PACKETS for name in p.overloads() if "out" not in name)
SPECIAL: Final[dict[Any, Callable[..., Any]]] = {  # what depends on data, or torch's meta kernels do in part only
    aten._local_scalar_dense.default: _number,
    aten.nonzero.default: _places,
    aten.index.Tensor: _index,
    aten._grouped_mm.default: _grouped,
    aten.gt.Scalar: _compared(aten.gt.Scalar, gt),
    aten.ge.Scalar: _compared(aten.ge.Scalar, ge),
}
