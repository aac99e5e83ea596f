"""Single rows of the embedding that train besides the updates (PEFT's `trainable_token_indices`), and a tied head's."""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from luthier import LuthierError
from torch import Tensor, nn
from torch.nn import functional

from luthier_lora.kept import Standing
from luthier_lora.layers import Switch
from luthier_lora.targets import Targets

FIELD: Final = "trainable_token_indices"
NAME: Final = "token_adapter.trainable_tokens_delta"  # PEFT's; it holds the rows themselves, no difference


class TokenRows(Standing):
    """A module with a weight [V, H] of which the rows [n, H] of some tokens train.

    Only these rows are kept and differentiated, so that no optimizer, decay or rounding can move the others.
    """

    place = "base_layer"

    def __init__(self, base_layer: nn.Module, ids: Tensor, rows: nn.Parameter, switch: Switch, *, owns: bool) -> None:
        super().__init__()
        self.base_layer, self.rows, self.switch, self.owns = base_layer, rows, switch, owns
        self.register_buffer("ids", ids.clone(), persistent=False)  # [n] int64
        self.train(base_layer.training)

    def own(self) -> dict[str, nn.Parameter]:
        """Return the rows under PEFT's name. A tied head has those of the embedding, and none of its own."""
        return {NAME: self.rows} if self.owns else {}

    @torch.no_grad()
    def fill(self) -> None:
        """Write the rows into the weight."""
        weight = cast(Tensor, self.base_layer.weight)
        weight.index_copy_(0, cast(Tensor, self.ids), self.rows.to(weight.dtype))


class EmbeddingRows(TokenRows):
    """An embedding that takes chosen tokens from the rows, and others from the frozen weight."""

    def forward(self, input_ids: Tensor) -> Tensor:  # [...] to [..., H]
        embeddings = self.base_layer(input_ids)
        if not self.switch.enabled:
            return embeddings
        hits = input_ids[..., None] == self.ids  # [..., n]
        own = functional.embedding(hits.int().argmax(-1), self.rows.to(embeddings.dtype))
        scale = getattr(self.base_layer, "embed_scale", None)  # Gemma 3 scales inside the module
        own = own if scale is None else own * scale.to(own.dtype)
        return torch.where(hits.any(-1)[..., None], own, embeddings)


class HeadRows(TokenRows):
    """A tied head that adds the change of the rows to the logits of chosen tokens; at the start it is exactly 0."""

    def forward(self, states: Tensor) -> Tensor:  # [..., H] to [..., V]
        logits = self.base_layer(states)
        if not self.switch.enabled:
            return logits
        ids = cast(Tensor, self.ids)
        change = self.rows - cast(Tensor, self.base_layer.weight).detach()[ids]
        return logits.index_add(-1, ids, functional.linear(states, change.to(states.dtype)).to(logits.dtype))


def check_rows(model: Any, token_ids: list[int], saved: tuple[str, ...], targets: Targets) -> None:
    """Raise for ids that are no rows, an embedding of codes, or one that trains in another way already."""
    embedding = model.get_input_embeddings()
    count = embedding.weight.shape[0]
    if len(set(token_ids)) < len(token_ids) or not all(0 <= token < count for token in token_ids):
        problem = f"they must be different and below {count}, the number of rows of the embedding"
        raise LuthierError("recipe-out-of-range", problem, where=FIELD, found=token_ids)
    paths = {path for path, _, _ in _places(model)}
    if not embedding.weight.is_floating_point() or embedding.weight.element_size() == 1:
        problem, remedy = "the embedding holds codes", "Do not quantize the embedding."
        raise LuthierError("model-target", problem, where=FIELD, remedy=remedy)
    twice = sorted(paths & {*saved, *targets.layers})
    if twice:
        problem = "the embedding or its tied head trains in another way already"
        remedy = f"Leave it out of target_modules and modules_to_save, or leave {FIELD} out."
        raise LuthierError("recipe-conflict", problem, where=FIELD, found=twice[0], remedy=remedy)


def stand_rows(model: Any, token_ids: list[int], switch: Switch) -> None:
    """Replace the embedding, and a head that is tied to it, by modules that share the rows of these tokens."""
    weight = model.get_input_embeddings().weight.detach()
    ids = torch.tensor(token_ids, device=weight.device)
    rows = nn.Parameter(weight[ids].to(torch.promote_types(weight.dtype, torch.float32), copy=True))
    for path, module, kind in _places(model):
        model.set_submodule(path, kind(module, ids, rows, switch, owns=kind is EmbeddingRows))


def _places(model: Any) -> list[tuple[str, nn.Module, type[TokenRows]]]:
    """Return the path and module of the embedding, and of the head if it has the same weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    places = [(path, module) for path, module in model.named_modules() if module is embedding or module is head]
    tied = head is not None and head.weight is embedding.weight
    kinds = [(path, module, EmbeddingRows if module is embedding else HeadRows) for path, module in places]
    return [place for place in kinds if place[2] is EmbeddingRows or tied]
