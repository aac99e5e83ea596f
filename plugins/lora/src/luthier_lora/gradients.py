"""The gradients of weights before training, which show the directions that the rows would change most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from luthier import Context
from torch import Tensor, nn

from luthier_lora.layers import sizes_of

HELD: Final = 2**31  # bytes of gradients in memory at once; further layers need further passes


def gradient_energies(
    model: Any, layers: Mapping[str, nn.Module], batches: int, context: Context, advance: Callable[..., None]
) -> dict[str, list[float]]:
    """Return the squared singular values of each layer's gradient over the first batches, descending.

    The gradient is that of the dense weight, which a quantized layer has too.
    """
    energies: dict[str, list[float]] = {}
    for group in _groups(layers):
        gradients = _add_gradients(model, group, batches, context)
        for name, gradient in gradients.items():
            energies[name] = torch.linalg.svdvals(gradient).double().square().tolist()
            advance()
    return energies


def _groups(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Cut layers into groups whose gradients fit into memory together."""
    group: dict[str, nn.Module] = {}
    size = 0
    for name, layer in layers.items():
        inputs, outputs = sizes_of(layer)
        if group and size + 4 * inputs * outputs > HELD:
            yield group
            group, size = {}, 0
        group[name] = layer
        size += 4 * inputs * outputs
    if group:
        yield group


def _add_gradients(model: Any, layers: Mapping[str, nn.Module], batches: int, context: Context) -> dict[str, Tensor]:
    """Return the sum over batches of dy^T x [out, in] of each layer, or zeros if the loss does not reach it."""
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
    """Return a forward hook that adds dy^T x to `total` when the gradient dy of the output is known."""

    def seen(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)

        def add(dy: Tensor) -> None:
            total.addmm_(dy.flatten(0, -2).T.float(), x.float())

        if output.requires_grad:
            output.register_hook(add)

    return seen
