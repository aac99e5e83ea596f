"""Lion against the paper's algorithm, written out by hand, and what a run relies on."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import Group, LuthierError
from luthier_lion import Lion
from luthier_lion.optimizer import LionOptimizer, LionPart


def paper(weight, gradients, lr, beta1, beta2, decay):
    """Algorithm 2 of arXiv 2302.06675, a line of it to a line here."""
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        step = torch.sign(beta1 * momentum + (1 - beta1) * gradient)
        weight = weight - lr * (step + decay * weight)
        momentum = beta2 * momentum + (1 - beta2) * gradient
    return weight, momentum


def run(optimizer, weights, gradients):
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = None if gradient is None else gradient.clone()
        optimizer.step()


def drawn(shapes, count, seed, dtype=torch.float64):
    """`count` gradients for a weight of each shape."""
    torch.manual_seed(seed)
    return [[torch.randn(shape, dtype=dtype) for shape in shapes] for _ in range(count)]


def weights_of(shapes, dtype=torch.float64):
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def group(weights, **settings):
    return Group(parameters=weights, names=[f"w{i}" for i in range(len(weights))], **settings)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(), (1,), (3,), (5, 7), (2, 3, 4)]), min_size=1, max_size=4),
    steps=st.integers(1, 6),
    lr=st.floats(1e-5, 0.5),
    beta1=st.floats(0, 0.9999),
    beta2=st.floats(0, 0.9999),
    decay=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_steps_are_those_of_the_paper(shapes, steps, lr, beta1, beta2, decay, seed):
    gradients = drawn(shapes, steps, seed)
    weights = weights_of(shapes)
    expected = [
        paper(w.detach().clone(), [g[i] for g in gradients], lr, beta1, beta2, decay) for i, w in enumerate(weights)
    ]
    optimizer = LionOptimizer(weights, lr=lr, betas=(beta1, beta2), weight_decay=decay)
    run(optimizer, weights, gradients)
    for weight, (value, momentum) in zip(weights, expected, strict=True):
        torch.testing.assert_close(
            weight.detach(), value, rtol=0, atol=1e-13 * steps * max(1, float(value.abs().max()))
        )
        torch.testing.assert_close(optimizer.state[weight]["momentum"], momentum, rtol=1e-12, atol=1e-14)


def test_every_weight_moves_by_the_learning_rate_whatever_its_gradient():
    weights = weights_of([(4, 3)])
    before = weights[0].detach().clone()
    gradient = torch.randn(4, 3, dtype=torch.float64) * torch.logspace(-9, 9, 12, dtype=torch.float64).view(4, 3)
    run(LionOptimizer(weights, lr=0.25), weights, [[gradient]])
    torch.testing.assert_close(weights[0].detach(), before - 0.25 * gradient.sign(), rtol=0, atol=1e-15)


def test_a_zero_gradient_moves_a_fresh_weight_only_by_its_decay():
    weights = weights_of([(3,)])
    before = weights[0].detach().clone()
    run(LionOptimizer(weights, lr=0.1, weight_decay=0.5), weights, [[torch.zeros(3, dtype=torch.float64)]])
    assert torch.equal(weights[0].detach(), before * (1 - 0.1 * 0.5))


def test_momentum_keeps_moving_a_weight_whose_gradient_vanished():
    weights = weights_of([(2,)])
    optimizer = LionOptimizer(weights, lr=0.1)
    run(optimizer, weights, [[torch.ones(2, dtype=torch.float64)]])
    between = weights[0].detach().clone()
    run(optimizer, weights, [[torch.zeros(2, dtype=torch.float64)]])
    torch.testing.assert_close(weights[0].detach(), between - 0.1)


def test_a_weight_without_gradient_stays_and_gets_no_state():
    weights = weights_of([(3,), (3,)])
    before = weights[1].detach().clone()
    optimizer = LionOptimizer(weights, lr=0.1, weight_decay=0.5)
    run(optimizer, weights, [[torch.ones(3, dtype=torch.float64), None]])
    assert torch.equal(weights[1].detach(), before)
    assert set(optimizer.state) == {weights[0]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_state_is_one_tensor_of_the_weights_dtype_and_shape(dtype):
    weights = weights_of([(5, 3)], dtype)
    optimizer = LionOptimizer(weights, lr=0.1)
    run(optimizer, weights, drawn([(5, 3)], 2, 0, dtype))
    ((name, momentum),) = optimizer.state[weights[0]].items()
    assert (name, momentum.dtype, momentum.shape, weights[0].dtype) == ("momentum", dtype, (5, 3), dtype)


def test_weights_of_different_dtypes_share_a_group():
    mixed = [torch.nn.Parameter(torch.ones(4, dtype=d)) for d in (torch.float32, torch.float64)]
    run(LionOptimizer(mixed, lr=0.5), mixed, [[torch.ones(4), -torch.ones(4, dtype=torch.float64)]] * 2)
    assert [w.detach().tolist() for w in mixed] == [[0.0] * 4, [2.0] * 4]


def test_a_restored_state_continues_bit_for_bit():
    shapes, gradients = [(6, 5), (5,)], drawn([(6, 5), (5,)], 7, 3, torch.float32)
    torch.manual_seed(1)
    straight = weights_of(shapes, torch.float32)
    halted = [torch.nn.Parameter(w.detach().clone()) for w in straight]
    arguments = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    run(LionOptimizer(straight, **arguments), straight, gradients)

    first = LionOptimizer(halted, **arguments)
    run(first, halted, gradients[:3])
    resumed = [torch.nn.Parameter(w.detach().clone()) for w in halted]
    second = LionOptimizer(resumed, **arguments)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, resumed, gradients[3:])
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_the_decay_option_reaches_weights_and_spares_norms_and_biases():
    hidden, norm, own = (weights_of([(2,)])[0] for _ in range(3))
    groups = [group([hidden]), group([norm], role="norm"), group([own], weight_decay=0.3, lr_scale=2.0)]
    optimizer = LionPart(Lion(weight_decay=0.2)).build(groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0, 0.3]
    assert [g["lr_scale"] for g in optimizer.param_groups] == [1.0, 1.0, 2.0]


def test_the_betas_option_reaches_every_group():
    optimizer = LionPart(Lion(betas=(0.5, 0.6))).build([group(weights_of([(2,)])), group(weights_of([(2,)]))])
    assert [g["betas"] for g in optimizer.param_groups] == [(0.5, 0.6)] * 2


def test_a_schedule_may_change_rate_and_decay_between_steps():
    weights = weights_of([(2,)])
    before = weights[0].detach().clone()
    optimizer = LionPart(Lion()).build([group(weights)])
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.1)
    run(optimizer, weights, [[torch.ones(2, dtype=torch.float64)]])
    torch.testing.assert_close(weights[0].detach(), before * (1 - 0.05) - 0.5)


def test_evaluation_sees_the_weights_that_are_stepped():
    weights = weights_of([(2,)])
    part = LionPart(Lion())
    part.build([group(weights)])
    before = weights[0].detach().clone()
    with part.evaluating():
        assert torch.equal(weights[0].detach(), before)


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    weights = weights_of([(3,)])

    def closure():
        loss = (weights[0] ** 2).sum()
        loss.backward()
        return loss

    start = float((weights[0].detach() ** 2).sum())
    assert LionOptimizer(weights, lr=1e-3).step(closure).item() == start
    assert float((weights[0].detach() ** 2).sum()) < start


def test_a_sparse_gradient_is_refused_with_its_remedy():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(LuthierError, match="sparse=False"):
        LionOptimizer(table.parameters(), lr=0.1).step()


@pytest.mark.parametrize("options", [{"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"weight_decay": -1.0}])
def test_options_out_of_bounds_are_refused(options):
    with pytest.raises(LuthierError) as caught:
        Lion(**options)
    assert caught.value.code == "recipe-out-of-range"


def test_one_beta_is_not_enough():
    with pytest.raises(LuthierError, match="betas"):
        Lion(betas=(0.9,))
