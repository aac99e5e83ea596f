"""The optimizer as a part: what it holds and what it refuses."""

import pytest
import torch
from luthier import Group
from luthier.testing import expect_error
from luthier_optimizers import AdamW8bit
from luthier_optimizers.parts import EightBitAdamW


def group(*parameters):
    names = [f"{number}.weight" for number in range(len(parameters))]
    return Group(parameters=list(parameters), names=names, role="hidden")


def bytes_of(optimizer, parameter):
    return sum(t.numel() * t.element_size() for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor))


def stepped(part, shape=(128, 128), dtype=torch.float32, steps=1, rate=1e-3):
    parameter = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = part.build([group(parameter)])
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        for settings in optimizer.param_groups:
            settings["lr"] = rate
        optimizer.step()
    return parameter, optimizer


def test_moments_take_two_bytes_a_weight():
    eight, optimizer = stepped(EightBitAdamW(AdamW8bit()))
    assert bytes_of(optimizer, eight) / eight.numel() == pytest.approx(2.03, abs=0.01)


def test_small_weights_keep_float32_moments():
    small, optimizer = stepped(EightBitAdamW(AdamW8bit()), (8, 8))
    assert {"exp_avg", "exp_avg_sq"} <= optimizer.state[small].keys()


def test_sharded_weights_are_refused():
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    parameter.full_tensor = lambda: parameter
    with expect_error("part-unsupported") as caught:
        EightBitAdamW(AdamW8bit()).build([group(parameter)])
    assert caught.value.code == "part-unsupported"
