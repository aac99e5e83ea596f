"""How a result that costs little is computed again, so that who needs it in the backward pass need not keep it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs
import torch
from torch import Tensor

NAME: Final = "luthier_source"  # the attribute of a tensor that has a source


@attrs.frozen(eq=False)
class TensorSource:
    """The function and inputs that gave a tensor. The backward pass of that function keeps the inputs anyway.

    An autograd function that needs the tensor in backward saves `inputs` with `save_for_backward`, and calls
    `function` with them there. The result has the same bits.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    version: int  # the number of in-place changes of the tensor when it was computed


def find_source(tensor: Tensor) -> TensorSource | None:
    """Return how `tensor` is computed again from what is kept anyway; None if it must be kept itself."""
    source = None if torch.compiler.is_compiling() else vars(tensor).get(NAME)
    return source if source is not None and source.version == tensor._version else None


def note_source(result: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Note on `result` that `function` of `inputs` gives it again, if they are kept for a backward pass."""
    if result.requires_grad and not torch.compiler.is_compiling():
        vars(result)[NAME] = TensorSource(function, tuple(t.detach() for t in inputs), result._version)
    return result
