"""What a run consists of once everything is loaded, checked and attached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
import torch

from luthier.data.examples import TokenDataset
from luthier.data.order import Order
from luthier.data.pack import pack
from luthier.engine.batch import Batch, collate
from luthier.engine.step import Step
from luthier.plugins.protocols import Context

if TYPE_CHECKING:
    from luthier.data.prepare import Report
    from luthier.recipe import Recipe


@attrs.define(kw_only=True, eq=False)
class Setup:
    """Everything the loop needs, and nothing that it has to look up."""

    recipe: Recipe
    model: Any
    tokenizer: Any
    adapter: Any
    loss: Any
    optimizer_part: Any
    quantizer: Any
    step: Step
    context: Context
    optimizer: torch.optim.Optimizer
    rates: list[float]
    order: Order
    train: TokenDataset
    validation: TokenDataset | None
    report: Report
    device: torch.device
    attention: str  # the implementation that the model had before the run
    numbers: dict[str, float] = attrs.field(factory=dict)  # what parts logged since the last step
    decays: list[float] = attrs.field(factory=list)  # each optimizer group's own weight decay

    def micro_batches(self, rows: Any) -> Iterator[Batch]:
        """The examples of one optimizer step, packed under the token limit."""
        return batches(self.train, [int(i) for i in rows], self.recipe, self.device)


def batches(dataset: TokenDataset, rows: list[int], recipe: Recipe, device: torch.device) -> Iterator[Batch]:
    """`rows` of a dataset as batches on the device, one document each where packing is off."""
    lengths = [int(dataset.starts[i + 1] - dataset.starts[i]) for i in rows]
    bins = pack(lengths, recipe.max_tokens_per_device) if recipe.packing else [[i] for i in range(len(rows))]
    for members in bins:
        yield collate([dataset[rows[i]] for i in members]).to(device)
