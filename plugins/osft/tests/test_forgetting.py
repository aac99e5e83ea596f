"""Two tasks in turn on a linear map: at an equal loss of the second, OSFT forgets less of the first than full tuning.

The first task is learned by gradient descent, whose changes lie in the directions of its inputs, so that they become
main directions of the weight. AdamW's do not: learned by it, the first task is forgotten more under OSFT than under
full tuning in this toy, and what OSFT is worth on a real model is for an experiment to say.
"""

import pytest
import torch
from luthier_osft.decompose import decompose
from luthier_osft.factored import FactoredLayer
from luthier_osft.layers import OsftLayer, Switch
from torch import nn

SIZE, INPUTS, RANK = 24, 8, 12


class Task:
    """Inputs of a few directions, and a random map to be learned."""

    def __init__(self, random):
        self.x = torch.randn(64, INPUTS, generator=random) @ torch.randn(INPUTS, SIZE, generator=random) / INPUTS**0.5
        self.y = self.x @ torch.randn(SIZE, SIZE, generator=random) / SIZE**0.5

    def loss(self, layer):
        return (layer(self.x) - self.y).square().mean()


def learn(layer, task, optimizer=torch.optim.AdamW, rate=2e-2, until=0.0):
    """Train until the loss is `until`. Return the last loss."""
    optimizer = optimizer([p for p in layer.parameters() if p.requires_grad], lr=rate)
    for _ in range(150):
        loss = task.loss(layer)
        if loss <= until:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(layer, FactoredLayer):
            layer.project(layer.left.detach(), layer.right.detach())
    return float(task.loss(layer).detach())


def plain(weight):
    layer = nn.Linear(SIZE, SIZE, bias=False)
    layer.weight.data.copy_(weight)
    return layer


def guarded(weight, kind):
    layer = kind(plain(weight).requires_grad_(False), RANK, Switch(), torch.device("cpu"))
    layer.begin(decompose(weight, RANK, tails=kind is FactoredLayer), RANK)
    return layer


@pytest.mark.parametrize("seed", range(6))
def test_the_first_task_is_forgotten_less_at_an_equal_loss_of_the_second(seed):
    random = torch.Generator().manual_seed(seed)
    first, second = Task(random), Task(random)
    begun = plain(torch.randn(SIZE, SIZE, generator=random) / 1000)
    before = learn(begun, first, torch.optim.SGD, 2.0)
    weight = begun.weight.detach().clone()
    start = float(second.loss(begun).detach())
    for kind in (OsftLayer, FactoredLayer):
        layer, full = guarded(weight, kind), plain(weight)
        reached = learn(layer, second)
        assert reached < 0.9 * start
        assert learn(full, second, until=reached) <= reached
        forgotten, forgotten_by_full = (float(first.loss(m).detach()) - before for m in (layer, full))
        assert forgotten < forgotten_by_full
