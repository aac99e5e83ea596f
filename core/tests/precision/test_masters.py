"""Steps of bfloat16 weights: small updates are not lost, nothing else changes, and both ways can be resumed."""

import pytest
import torch
from luthier.precision import bf16_steps as masters
from luthier.precision.bf16_steps import MasterStep, StochasticStep, put_tensor
from torch import nn


def weights(sizes=(8, 5), seed=0, value=None):
    random = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        wide = torch.randn(size, size, generator=random) if value is None else torch.full((size, size), value)
        parameter = nn.Parameter(wide.to(torch.bfloat16))
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.randn(size, size, generator=random)
        made.append(parameter)
    return made


def sgd(made, rate):
    return torch.optim.SGD(made, lr=rate, foreach=False)


def test_an_update_below_a_step_of_bfloat16_is_made_on_average():
    """Rounded to the nearest, a weight of 1 would never leave it at this rate."""
    (parameter,) = made = weights((64,), value=1.0)
    parameter.grad = torch.ones_like(parameter.grad)
    optimizer, stepping = sgd(made, 1e-4), StochasticStep(seed=0)
    for index in range(100):
        stepping.step(optimizer, index)
    assert parameter.dtype is torch.bfloat16
    assert float(parameter.detach().double().mean()) == pytest.approx(0.99, abs=1e-3)
    assert torch.tensor(1.0 - 1e-4).to(torch.bfloat16) == 1.0


def test_the_optimizers_state_is_float32_and_the_weights_stay_where_they_lay():
    made = weights()
    places = [p.data_ptr() for p in made]
    optimizer = torch.optim.AdamW(made, lr=1e-2)
    StochasticStep(seed=0).step(optimizer, 0)
    assert [p.data_ptr() for p in made] == places
    assert {v.dtype for held in optimizer.state.values() for v in held.values()} == {torch.float32}


@pytest.mark.parametrize("separable", [False, True])
def test_stepping_in_chunks_changes_nothing(monkeypatch, separable):
    monkeypatch.setattr(masters, "CHUNK", 30)
    chunked, whole = weights((5, 4, 3)), weights((5, 4, 3))
    one, other = torch.optim.AdamW(chunked, lr=0.1), torch.optim.AdamW(whole, lr=0.1)
    for index in range(3):
        StochasticStep(seed=7, separable=separable).step(one, index)
        StochasticStep(seed=7).step(other, index)
    assert all(torch.equal(a, b) for a, b in zip(chunked, whole, strict=True))
    assert all(p.grad is not None for p in chunked)


def test_the_seed_and_the_step_decide_the_rounding():
    def stepped(seed, index):
        made = weights()
        StochasticStep(seed=seed).step(sgd(made, 1e-3), index)
        return torch.cat([p.detach().flatten() for p in made])

    assert torch.equal(stepped(0, 3), stepped(0, 3))
    assert not torch.equal(stepped(0, 3), stepped(0, 4))
    assert not torch.equal(stepped(0, 3), stepped(1, 3))


def test_a_parameter_without_gradient_is_passed_by():
    reached, idle = made = weights()
    idle.grad, before = None, idle.detach().clone()
    StochasticStep(seed=0).step(torch.optim.AdamW(made, lr=0.1, weight_decay=0.5), 0)
    assert torch.equal(idle.detach(), before)
    assert reached.grad is not None


def test_an_optimizer_that_fails_leaves_bfloat16_weights():
    made = weights()
    broken = torch.optim.LBFGS(made)  # wants a closure
    for stepping in (StochasticStep(seed=0), MasterStep({p: p.detach().float() for p in made})):
        with pytest.raises(TypeError):
            stepping.step(broken, 0)
        assert {p.dtype for p in made} == {torch.bfloat16}


def test_masters_take_the_trajectory_of_float32_weights():
    made = weights()
    wide = [nn.Parameter(p.detach().float()) for p in made]
    for parameter, copy in zip(made, wide, strict=True):
        copy.grad = parameter.grad.clone()
    ours, theirs = torch.optim.AdamW(made, lr=1e-3), torch.optim.AdamW(wide, lr=1e-3)
    stepping = MasterStep({p: p.detach().float() for p in made})
    for index in range(20):
        stepping.step(ours, index)
        theirs.step()
    for parameter, copy in zip(made, wide, strict=True):
        assert torch.equal(stepping.masters[parameter], copy.detach())
        assert torch.equal(parameter.detach(), copy.detach().to(torch.bfloat16))


def test_a_weight_that_someone_else_has_set_is_what_training_goes_on_from():
    (parameter,) = made = weights((4,))
    stepping = MasterStep({parameter: parameter.detach().float() + 1e-4})
    with torch.no_grad():
        parameter[0] = 5.0
    parameter.grad.zero_()
    stepping.step(sgd(made, 1.0), 0)
    assert torch.equal(parameter[0].detach().float(), torch.full((4,), 5.0))
    assert torch.equal(stepping.masters[parameter][0], torch.full((4,), 5.0))


def test_masters_are_state():
    made = weights()
    one = MasterStep({p: p.detach().float() + 1e-4 for p in made})
    other = MasterStep({p: torch.zeros(p.shape) for p in made})
    other.load_state(one.state())
    assert all(torch.equal(a, b) for a, b in zip(one.masters.values(), other.masters.values(), strict=True))


def test_a_parameter_holds_another_tensor_and_stays_itself():
    layer = nn.Linear(3, 3)
    kept = layer.weight
    put_tensor(layer.weight, kept.detach().to(torch.bfloat16))
    assert layer.weight is kept
    assert kept.dtype is torch.bfloat16
