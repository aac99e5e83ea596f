"""The built-in optimizers: what reaches torch's, by which kernel, and some parameters without the others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.builtin import AdamW, Sgd
from luthier.builtin.optimizers import FusedAdamW, MomentumSgd
from luthier.plugins.contracts.values import Group
from torch.profiler import profile

PARTS = {"adamw": lambda: FusedAdamW(AdamW(weight_decay=0.1)), "sgd": lambda: MomentumSgd(Sgd(momentum=0.9))}
PLAIN = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=False),
}


def parameters(seed=0, sizes=(5, 3, 7), dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.randn(n, n, generator=random, dtype=dtype)) for n in sizes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=random, dtype=dtype)
    return made


def built(name, made):
    optimizer = PARTS[name]().build([Group(parameters=made, names=[str(i) for i in range(len(made))])])
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    return optimizer


@pytest.mark.parametrize(("name", "kernel"), [("adamw", "aten::_fused_adamw_"), ("sgd", "aten::_fused_sgd_")])
def test_one_kernel_steps_every_tensor_of_a_group(name, kernel):
    optimizer = built(name, parameters(dtype=torch.float32))
    optimizer.step()
    with profile() as seen:
        optimizer.step()
    calls = {event.key: event.count for event in seen.key_averages()}
    assert calls.get(kernel) == 1


@pytest.mark.parametrize("name", PARTS)
def test_the_fused_kernel_computes_what_the_loop_over_tensors_does(name):
    ours, theirs = parameters(), parameters()
    one, other = built(name, ours), PLAIN[name](theirs)
    for _ in range(5):
        one.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=10)
@given(name=st.sampled_from(sorted(PARTS)), cut=st.integers(0, 3), steps=st.integers(1, 4))
def test_parameters_stepped_in_turns_are_those_stepped_at_once(name, cut, steps):
    """What `separable` promises."""
    assert PARTS[name]().separable
    whole, parts = parameters(), parameters()
    at_once, in_turns = built(name, whole), built(name, parts)
    for _ in range(steps):
        at_once.step()
        gradients = [p.grad for p in parts]
        for shown in (range(cut), range(cut, 3)):
            for i, parameter in enumerate(parts):
                parameter.grad = gradients[i] if i in shown else None
            in_turns.step()
        for parameter, gradient in zip(parts, gradients, strict=True):
            parameter.grad = gradient
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
