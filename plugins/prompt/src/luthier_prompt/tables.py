"""The tables of prompts: a plain one, and one that an encoder computes. Both return columns on demand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PromptTable(nn.Module):
    """A table [N, width] of trained numbers."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def columns(self, first: int, last: int) -> Tensor:
        """Return [N, last - first]."""
        return self.weight[:, first:last]

    def whole(self) -> Tensor:
        return self.weight


class EncodedTable(nn.Module):
    """A table [N, width] = tanh(E W1^T + b1) W2^T + b2 of trained E [N, own width], W1 and W2, as PEFT has it.

    Li and Liang 2021, arXiv 2101.00190; Liu et al. 2022, arXiv 2110.07602.
    """

    def __init__(self, rows: int, own_width: int, hidden: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, own_width)
        self.inner = nn.Linear(own_width, hidden)
        self.outer = nn.Linear(hidden, width)

    def columns(self, first: int, last: int) -> Tensor:
        """Return [N, last - first]. Columns of other layers are not computed."""
        hidden = torch.tanh(functional.linear(self.embedding.weight, self.inner.weight, self.inner.bias))  # [N, hidden]
        return functional.linear(hidden, self.outer.weight[first:last], self.outer.bias[first:last])

    def whole(self) -> Tensor:
        return self.columns(0, self.outer.out_features)
