"""Register operations with torch in the library `luthier`, with shapes for tracing and with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("luthier", "DEF")


def register_operation(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define `luthier::NAME` by its schema and return it, callable and usable under `torch.compile`.

    `function` computes without autograd, and `fake` returns results of the right shape and dtype. `save(ctx, inputs,
    output)` and `backward(ctx, *gradients)` define its gradient; without them a backward pass raises.
    """
    name = schema.partition("(")[0]
    qualified = f"luthier::{name}"
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    operation = getattr(torch.ops.luthier, name).default
    if operation._schema.is_mutable:
        return operation

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"luthier::{name} has no derivative of this order")

    torch.library.register_autograd(qualified, backward or refuse, setup_context=save, lib=LIBRARY)
    return operation
