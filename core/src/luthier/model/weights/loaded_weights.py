"""Loaded weights: those that a checkpoint lacks, holds besides, has in another shape, or whose numbers are none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from luthier.errors import LuthierError

SHOWN: Final = 3  # the most weights of each kind that a message names
REMEDY: Final = "Check the sizes in the model's config.json, or copy its files again."


def check_keys(info: Mapping[str, Any], source: str) -> None:
    """Raise `model-weights` where a load has shown that weights and config do not belong together.

    Tied weights are in the checkpoint once, and are not missing.
    """
    shapes = [f"{name} {list(theirs)} for {list(ours)}" for name, theirs, ours in sorted(info["mismatched_keys"])]
    kinds = {
        "lacks": sorted(info["missing_keys"]),
        "has in another shape": shapes,
        "holds, though its config knows of none such,": sorted(info["unexpected_keys"]),
    }
    problems = [f"{verb} {_listed(names)}" for verb, names in kinds.items() if names]
    if problems:
        problem = f"the checkpoint {'; it '.join(problems)}"
        raise LuthierError("model-weights", problem, where=source, remedy=REMEDY)
    errors = info.get("error_msgs") or info.get("conversion_errors")
    if errors:
        raise LuthierError("model-weights", _listed([str(error) for error in errors]), where=source, remedy=REMEDY)


def check_finite(model: nn.Module, source: str) -> None:
    """Raise `model-weights` where a weight of the model holds NaN or infinity; one without values is not looked at."""
    check_tensors(model.named_parameters(), source)


@torch.no_grad()
def check_tensors(tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Raise `model-weights` where one of these named tensors holds NaN or infinity."""
    numbered = [(name, tensor) for name, tensor in tensors if _has_numbers(tensor)]
    wrong = [name for (name, _), finite in zip(numbered, _finite(numbered), strict=True) if not finite]
    if wrong:
        problem, remedy = f"NaN or infinity stands in {_listed(wrong)}", "Copy the files again; they are damaged."
        raise LuthierError("model-weights", problem, where=source, remedy=remedy)


def _finite(tensors: Sequence[tuple[str, Tensor]]) -> list[bool]:
    """Return for each tensor if it is finite; a device is waited for once."""
    flags = [_largest(tensor).isfinite() for _, tensor in tensors]
    place = {flag.device for flag in flags}
    if len(place) == 1:
        return torch.stack(flags).tolist() if flags else []
    return [bool(flag) for flag in flags]


def _largest(tensor: Tensor) -> Tensor:
    """Return the largest magnitude, which is finite if all are; no second tensor of the size is made."""
    tensor = tensor.detach()
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    numbers = local.float() if local.element_size() < 2 else local  # aminmax does not support 8-bit floats
    least, most = torch.aminmax(numbers)
    return torch.maximum(most.abs(), least.abs())


def _has_numbers(tensor: Tensor) -> bool:
    """Return True if a tensor's numbers are in memory; packed codes are none, whatever dtype their bytes have."""
    empty = tensor.is_meta or getattr(tensor, "has_no_data", False) or not tensor.numel()
    is_packed = getattr(tensor, "quant_state", None) is not None
    return tensor.is_floating_point() and not empty and not is_packed


def _listed(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
