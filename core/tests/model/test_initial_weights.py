"""Kept weights: copies of what trains are made anew without a second copy of all beside the first."""

import pytest
import torch
from luthier.hardware.memory_meter import Meter
from luthier.model.weights.initial_weights import InitialWeights
from luthier.plugins.contracts.values import Group
from luthier.step.start_weights import StartWeights
from luthier.testing.worlds import tiny_model
from torch import nn


class Whole:
    """Stands for an adapter that trains the whole model."""

    def __init__(self, model):
        self.model = model

    def groups(self):
        named = dict(self.model.named_parameters())
        return [Group(parameters=list(named.values()), names=list(named))]


@pytest.mark.parametrize("make", [lambda model: InitialWeights(model, {}), lambda model: StartWeights(Whole(model))])
def test_a_second_capture_holds_no_second_copy_of_all_weights(make):
    model = tiny_model()
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    with Meter() as meter:
        kept = make(model)
        before = meter.ledger.live
        kept.capture()
    assert before <= meter.ledger.peak <= before + largest


@torch.no_grad()
def test_a_second_capture_has_the_weights_of_its_time():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    kept = InitialWeights(model, {})
    before = list(kept.constants())
    for parameter in model.parameters():
        parameter.add_(1.0)
    kept.capture()
    assert list(kept.constants()) == before
    assert all(torch.equal(kept.constants()[name], p) for name, p in model.named_parameters())
