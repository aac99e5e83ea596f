"""Single rows of the embedding that train besides the updates (PEFT's `trainable_token_indices`), and a tied head's."""

from __future__ import annotations

from typing import Any, Final

import torch
from luthier import LuthierError, TokenRows, check_token_rows, find_row_places
from torch import Tensor, nn

from luthier_lora.targets import Targets

FIELD: Final = "trainable_token_indices"
NAME: Final = "token_adapter.trainable_tokens_delta"  # PEFT's; it holds the rows themselves, no difference


def name_rows(module: TokenRows) -> dict[str, nn.Parameter]:
    """Return the rows under PEFT's name. A tied head has those of the embedding, and none of its own."""
    return {NAME: module.rows} if module.owns else {}


def drop_tied_rows(model: Any, tensors: dict[str, Tensor], prefix: str, where: str) -> dict[str, Tensor]:
    """Return a file's tensors without the rows of a tied head, which PEFT adds to the embedding's for a resized base.

    Raises `artifact-mismatch` if they differ from the embedding's.
    """
    modules = {path: module for path, module in model.named_modules() if isinstance(module, TokenRows)}
    for path, module in modules.items():
        name = f"{prefix}{path}.{NAME}"
        if module.owns or name not in tensors:
            continue
        owner = next(other for other, one in modules.items() if one.owns and one.rows is module.rows)
        copy = tensors.pop(name)
        if not torch.equal(copy, tensors.get(f"{prefix}{owner}.{NAME}", copy)):
            problem, remedy = "the tied head has other rows than the embedding", "Copy the file again."
            raise LuthierError("artifact-mismatch", problem, where=where, found=name, remedy=remedy)
    return tensors


def check_rows(model: Any, token_ids: list[int], saved: tuple[str, ...], targets: Targets) -> None:
    """Raise for ids that are no rows, an embedding of codes, or one that trains in another way already."""
    check_token_rows(model, token_ids, where=FIELD, own_head=False)
    twice = sorted(find_row_places(model, own_head=False).keys() & {*saved, *targets.layers})
    if twice:
        problem = "the embedding or its tied head trains in another way already"
        remedy = f"Leave it out of target_modules and modules_to_save, or leave {FIELD} out."
        raise LuthierError("recipe-conflict", problem, where=FIELD, found=twice[0], remedy=remedy)
