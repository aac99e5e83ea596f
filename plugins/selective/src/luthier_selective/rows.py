"""Single rows that train in an embedding or head that is otherwise frozen."""

from __future__ import annotations

from typing import Any, cast

import torch
from luthier import LuthierError
from torch import Tensor, nn
from torch.nn import functional


class TokenRows(nn.Module):
    """A wrapper of a module with a weight [V, H] in which some rows train. It forwards the module's attributes.

    Only the rows are kept and differentiated, so that no optimizer, decay or rounding can move the others.
    """

    def __init__(self, base_layer: nn.Module, ids: Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self.base_layer, self.rows = base_layer, rows
        self.register_buffer("ids", ids.clone(), persistent=False)  # [n] int64, a copy for each module
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["base_layer"], name)

    def plain(self) -> nn.Module:
        """Return the module with the rows in its weight."""
        with torch.no_grad():
            weight = cast(Tensor, self.base_layer.weight)
            weight.index_copy_(0, self.ids, self.rows.to(weight.dtype))
        return self.base_layer


class EmbeddingRows(TokenRows):
    """An embedding that takes chosen tokens from the rows, and others from the frozen weight."""

    def forward(self, input_ids: Tensor) -> Tensor:  # [...] to [..., H]
        embeddings = self.base_layer(input_ids)
        hits = input_ids[..., None] == self.ids  # [..., n]
        own = functional.embedding(hits.int().argmax(-1), self.rows.to(embeddings.dtype))
        scale = getattr(self.base_layer, "embed_scale", None)  # Gemma 3 scales inside the module
        own = own if scale is None else own * scale.to(own.dtype)
        return torch.where(hits.any(-1)[..., None], own, embeddings)


class HeadRows(TokenRows):
    """A head that adds the change of the rows to the logits of chosen tokens. At the start it is exactly 0."""

    def forward(self, states: Tensor) -> Tensor:  # [..., H] to [..., V]
        logits = self.base_layer(states)
        change = self.rows - self.base_layer.weight.detach()[self.ids]  # type: ignore[operator]
        return logits.index_add(-1, self.ids, functional.linear(states, change.to(states.dtype)).to(logits.dtype))


def stand_in(model: Any, token_ids: list[int], has_values: bool) -> None:
    """Wrap the input embedding and the head with rows of these tokens. A tied pair shares them."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    count = embedding.weight.shape[0]
    if len(set(token_ids)) < len(token_ids) or max(token_ids) >= count:
        problem = f"token ids must be different and below {count}, the number of rows of the embedding"
        raise LuthierError("recipe-out-of-range", problem, where="token_ids", found=token_ids)
    ids = torch.tensor(token_ids, device=embedding.weight.device)
    shared: dict[int, nn.Parameter] = {}
    paths = {id(module): path for path, module in model.named_modules()}
    for module, kind in ((embedding, EmbeddingRows), (head, HeadRows)):
        if module is None:
            continue
        weight = module.weight.detach()
        if not weight.is_floating_point() or weight.element_size() == 1:
            problem, remedy = f"{paths[id(module)]} holds codes", "Do not quantize the embedding."
            raise LuthierError("model-target", problem, where="token_ids", remedy=remedy)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if id(module.weight) not in shared:
            first = weight[ids] if has_values else weight.new_zeros(len(ids), weight.shape[1])
            shared[id(module.weight)] = nn.Parameter(first.to(dtype, copy=True))
        model.set_submodule(paths[id(module)], kind(module, ids, shared[id(module.weight)]))
