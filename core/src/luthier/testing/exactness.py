"""Comparisons in float64, which transformers' own casts to float32 would spoil."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def unrounded() -> Iterator[None]:
    """Replace every cast of a float64 tensor to float32 by none within this context, so that nothing is rounded.

    Norms and softmax cast so, and sums of gradients through a cast depend on their order by float32's precision.
    """
    with _Unrounded():
        yield


class _Unrounded(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func in (torch.Tensor.to, torch.Tensor.type):
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
