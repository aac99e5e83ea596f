"""Recomputed buffers: numbers that no file of a model holds, as its modules make them again from the config."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


@torch.no_grad()
def find_recomputed(model: nn.Module) -> Iterator[str]:
    """Yield each buffer that no file holds and that its module, made anew from its config, has with other numbers.

    Rotary frequencies are such buffers: a model that was rounded as a whole and widened again has them rounded. A
    module that its config alone does not make is not compared, nor are frequencies that the module changes itself.
    """
    for path, module in model.named_modules():
        names = module._non_persistent_buffers_set & {name for name, _ in module.named_buffers(recurse=False)}
        config = getattr(module, "config", None)
        if not names or config is None or next(module.parameters(), None) is not None:
            continue
        try:
            fresh = type(module)(config)
        except (TypeError, ValueError, AttributeError):
            continue
        originals = {name for name in names if f"original_{name}" in names}
        for name in sorted(names - originals):
            own, made = getattr(module, name), getattr(fresh, name, None)
            if own.is_floating_point() and made is not None and not torch.equal(own.cpu(), made.cpu().to(own.dtype)):
                yield f"{path}.{name}"
