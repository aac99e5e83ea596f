"""The gradient of each layer's weight before anything is trained: which directions the rows would change most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from luthier import Context
from torch import Tensor, nn

from luthier_lora.layers import sizes_of

HELD: Final = 2**31  # bytes of gradients at once; layers beyond that have passes of their own


def gradient_energies(
    model: Any, layers: Mapping[str, nn.Module], batches: int, context: Context, told: Callable[..., None]
) -> dict[str, list[float]]:
    """Return the squared singular values of each layer's gradient over the first batches, falling.

    It is that of the weight as a dense one, so that a quantized layer has one too.
    """
    energies: dict[str, list[float]] = {}
    for group in _groups(layers):
        gradients = _add_gradients(model, group, batches, context)
        for name, gradient in gradients.items():
            energies[name] = torch.linalg.svdvals(gradient).double().square().tolist()
            told()
    return energies


def _groups(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Cut layers into groups whose gradients fit into memory together."""
    group: dict[str, nn.Module] = {}
    held = 0
    for name, layer in layers.items():
        inputs, outputs = sizes_of(layer)
        if group and held + 4 * inputs * outputs > HELD:
            yield group
            group, held = {}, 0
        group[name] = layer
        held += 4 * inputs * outputs
    if group:
        yield group


def _add_gradients(model: Any, layers: Mapping[str, nn.Module], batches: int, context: Context) -> dict[str, Tensor]:
    """Return the sum over the batches of dy^T x [out, in] of each layer; zeros where the loss does not reach one."""
    sums = {name: torch.zeros(sizes_of(layer)[::-1], device=context.device) for name, layer in layers.items()}

    handles = [layer.register_forward_hook(_watch(sums[name])) for name, layer in layers.items()]
    try:
        for batch in context.batches(batches):
            context.differentiate(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _watch(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Return a hook of a layer that adds dy^T x to a total when the gradient dy of its output has come."""

    def seen(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)

        def add(dy: Tensor) -> None:
            total.addmm_(dy.flatten(0, -2).T.float(), x.float())

        if output.requires_grad:
            output.register_hook(add)

    return seen
