"""Selective recomputation: the results of matrix products and attention are kept, everything between them is not.

torch's `create_selective_checkpoint_contexts` keeps what an operation returned, and fails where that is changed in
place afterwards, as a product is that another one is accumulated into. Here the last value is kept, and the changes
that led to it are not made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Final

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
PRODUCTS: Final = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.linear, aten.matmul, aten._grouped_mm}
ATTENTION: Final = ("attention", "attn")  # words in the name of every fused attention, torch's or flash-attn's
# a product over fewer terms, such as a low-rank update's second, is cheaper to compute again than to keep
THIN: Final = 64


@attrs.define(eq=False)
class Kept:
    """The result of one product. `read` is True once something other than a change in place has used it.

    `spoiled`: read, and changed after that or after the pass: the value that was read is gone, so it is made again.
    """

    result: Any
    read: bool = False
    spoiled: bool = False
    version: int = 0  # the number of in-place changes at the end of the pass

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(self.result) if isinstance(leaf, Tensor)]

    def changes(self) -> int:
        return sum(tensor._version for tensor in self.tensors())

    def again(self) -> Any:
        """Return the result in a form that autograd can make part of another graph."""
        return tree_map_only(Tensor, Tensor.detach, self.result)


@attrs.define(eq=False)
class Ledger:
    """The products of one pass through a layer, in order, and where they are found by storage."""

    products: list[Kept] = attrs.field(factory=list)
    by_storage: dict[int, Kept] = attrs.field(factory=dict)
    made_again: int = 0


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For `checkpoint(context_fn=...)`: around the pass of forward, and around that of backward."""
    ledger = Ledger()
    return _Keeping(ledger), _Giving(ledger)


class _Mode(TorchDispatchMode):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled kernels run as they are: elementwise ones, which are made again anyway."""
        return True


class _Keeping(_Mode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self.ledger.by_storage
        for tensor, is_written in _touched(func, args, kwargs):
            product = known.get(_storage(tensor))
            if product is not None:
                product.spoiled |= is_written and product.read
                product.read |= not is_written and not _is_view(func)
        out = func(*args, **kwargs)
        if _is_product(func, args, kwargs):
            product = Kept(tree_map_only(Tensor, _counting, out))
            self.ledger.products.append(product)
            known.update({_storage(tensor): product for tensor in product.tensors()})
        return out

    def __exit__(self, *error: Any) -> Any:
        for product in self.ledger.products:
            product.version = product.changes()
        return super().__exit__(*error)


class _Giving(_Mode):
    def __enter__(self) -> Any:
        self.ledger.made_again = 0
        for product in self.ledger.products:
            product.spoiled |= product.changes() != product.version
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_product(func, args, kwargs):
            product = self.ledger.products[self.ledger.made_again]
            self.ledger.made_again += 1
            return func(*args, **kwargs) if product.spoiled else product.again()
        written = [t for t, is_written in _touched(func, args, kwargs) if is_written]
        if len(written) == 1 and self._is_final(written[0]):
            return written[0]
        return func(*args, **kwargs)

    def _is_final(self, tensor: Tensor) -> bool:
        """Return True if a tensor that is about to be changed has its last value already."""
        product = self.ledger.by_storage.get(_storage(tensor))
        return product is not None and not product.spoiled


def _is_product(func: Any, args: Any, kwargs: Any) -> bool:
    packet = func.overloadpacket
    if func._schema.is_mutable:
        return False
    if packet in PRODUCTS:
        left = args[1] if packet in (aten.addmm, aten.baddbmm) else args[0]
        return left.shape[-1] >= THIN
    name = packet.__name__
    is_attention = any(word in name for word in ATTENTION) and "backward" not in name
    # an operation that is not run again must not have drawn random numbers
    return is_attention and not _draws(func, args, kwargs)


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Return True if attention drops some of its weights by chance."""
    named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    return any(named[name] for name in named if name.startswith("dropout"))


def _touched(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, bool]]:
    """Yield each tensor that an operation is given, and whether it writes to it."""
    schema = func._schema.arguments
    named = {a.name: a for a in schema}
    pairs = [*zip(schema, args, strict=False), *((named[k], v) for k, v in kwargs.items() if k in named)]
    for argument, value in pairs:
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        for leaf in tree_leaves(value) if isinstance(value, (list, tuple)) else (value,):
            if isinstance(leaf, Tensor):
                yield leaf, is_written


def _is_view(func: Any) -> bool:
    """Return True if it only looks at the same memory in another shape; what is done with that is seen by itself."""
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not func._schema.is_mutable


def _counting(tensor: Tensor) -> Tensor:
    """Return the same memory, with the count of its changes: below autograd a plain `detach` would begin another."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
