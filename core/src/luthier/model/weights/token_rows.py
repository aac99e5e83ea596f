"""Token rows: single rows of an embedding or a head that train, while its weight stays frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier.errors import LuthierError


class RowSwitch(Protocol):
    """A switch that an adapter turns off where the model shall compute what it did without it."""

    enabled: bool


class TokenRows(nn.Module):
    """A module with a weight [V, H] of which the rows [n, H] of some tokens train. It forwards the module's attributes.

    Only these rows are kept and differentiated, so that no optimizer, decay or rounding can move the others. `owns` is
    False for a head that is tied to the embedding: its rows are the embedding's.
    """

    def __init__(
        self, base_layer: nn.Module, ids: Tensor, rows: nn.Parameter, *, owns: bool, switch: RowSwitch | None
    ) -> None:
        super().__init__()
        self.base_layer, self.rows, self.owns, self.switch = base_layer, rows, owns, switch
        self.register_buffer("ids", ids.clone(), persistent=False)  # [n] int64, a copy for each module
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["base_layer"], name)

    @property
    def is_on(self) -> bool:
        """Return True if the rows take part, and False if the module computes what the frozen one does."""
        return self.switch is None or self.switch.enabled

    @torch.no_grad()
    def write_rows(self) -> nn.Module:
        """Write the rows into the weight, and return the module that was replaced."""
        weight = cast(Tensor, self.base_layer.weight)
        weight.index_copy_(0, cast(Tensor, self.ids), self.rows.to(weight.dtype))
        return self.base_layer


class EmbeddingRows(TokenRows):
    """An embedding that takes chosen tokens from the rows, and others from the frozen weight."""

    def forward(self, input_ids: Tensor) -> Tensor:  # [...] to [..., H]
        embeddings = self.base_layer(input_ids)
        if not self.is_on:
            return embeddings
        hits = input_ids[..., None] == self.ids  # [..., n]
        own = functional.embedding(hits.int().argmax(-1), self.rows.to(embeddings.dtype))
        scale = getattr(self.base_layer, "embed_scale", None)  # Gemma 3 scales inside the module
        own = own if scale is None else own * scale.to(own.dtype)
        return torch.where(hits.any(-1)[..., None], own, embeddings)


class HeadRows(TokenRows):
    """A head that adds the change of the rows to the logits of chosen tokens. At the start it is exactly 0."""

    def forward(self, states: Tensor) -> Tensor:  # [..., H] to [..., V]
        logits = self.base_layer(states)
        if not self.is_on:
            return logits
        ids = cast(Tensor, self.ids)
        change = self.rows - cast(Tensor, self.base_layer.weight).detach()[ids]
        return logits.index_add(-1, ids, functional.linear(states, change.to(states.dtype)).to(logits.dtype))


def find_row_places(model: Any, *, own_head: bool) -> dict[str, type[TokenRows]]:
    """Return the kind of rows by the path of each module that needs some: the embedding, and perhaps the head.

    A head that is tied to the embedding always does, another one if it is to have rows of its own (`own_head`).
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    places: dict[str, type[TokenRows]] = {paths[id(embedding)]: EmbeddingRows}
    if head is not None and (own_head or head.weight is embedding.weight):
        places[paths[id(head)]] = HeadRows
    return places


def check_token_rows(model: Any, token_ids: Sequence[int], *, where: str, own_head: bool) -> None:
    """Raise for ids that are no rows of the embedding, and for a weight of codes. `where` is the option's name."""
    count = model.get_input_embeddings().weight.shape[0]
    if len(set(token_ids)) < len(token_ids) or not all(0 <= token < count for token in token_ids):
        problem = f"token ids must be different and below {count}, the number of rows of the embedding"
        raise LuthierError("recipe-out-of-range", problem, where=where, found=list(token_ids))
    for path in find_row_places(model, own_head=own_head):
        weight = model.get_submodule(path).weight
        if not weight.is_floating_point() or weight.element_size() == 1:
            problem, remedy = f"{path} holds codes", "Do not quantize the embedding or the head."
            raise LuthierError("model-target", problem, where=where, remedy=remedy)


def place_token_rows(
    model: Any, token_ids: Sequence[int], *, own_head: bool, switch: RowSwitch | None = None
) -> dict[str, TokenRows]:
    """Replace the embedding, and the head where `find_row_places` says so, and return the new modules by their paths.

    The rows are float32 or better, and begin as they are. A tied pair shares them. See `check_token_rows` for what must
    be checked before.
    """
    rows: dict[int, nn.Parameter] = {}
    placed: dict[str, TokenRows] = {}
    for path, kind in find_row_places(model, own_head=own_head).items():
        module = model.get_submodule(path)
        weight, owns = module.weight.detach(), id(module.weight) not in rows
        ids = torch.tensor(token_ids, device=weight.device)
        if owns:
            first = weight[ids].to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            rows[id(module.weight)] = nn.Parameter(first)
        placed[path] = kind(module, ids, rows[id(module.weight)], owns=owns, switch=switch)
        model.set_submodule(path, placed[path])
    return placed
