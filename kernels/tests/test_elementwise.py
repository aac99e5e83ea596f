"""Norms, rotations and gates against autograd through their references, in every implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_kernels import only_implementation, quantize_activations
from luthier_kernels.elementwise import (
    add_and_normalize,
    gate_states,
    gates,
    norm,
    normalize_quantized,
    normalize_rms,
    rope,
    rotate_heads,
)
from luthier_kernels.native import has_native

IMPLEMENTATIONS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(not has_native("elementwise"), reason="no compiler")),
]
shapes = st.tuples(st.sampled_from([(), (1,), (5,), (2, 70)]), st.sampled_from([1, 2, 15, 16, 17, 64, 130]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def drawn(shape, seed=0, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def gradients(function, tensors, upstream):
    """Outputs, and the gradient to each tensor."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])
    return [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves)]


def assert_near(ours, exact, dtype):
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 3e-2, "atol": 0.1}
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **close)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(
    shape=shapes,
    dtype=dtypes,
    offset=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 9),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_the_norm_and_its_gradients(implementation, shape, dtype, offset, seed, scale):
    x, weight = drawn((*shape[0], shape[1]), seed, dtype, scale), drawn(shape[1], seed + 1, dtype)
    up = [drawn(x.shape, seed + 2)]
    with only_implementation(implementation):
        ours = gradients(lambda x, w: normalize_rms(x, w, 1e-5, offset), (x, weight), up)
    exact = gradients(lambda x, w: norm.reference_normalize(x, w, 1e-5, offset), (x.double(), weight.double()), up)
    assert ours[0].dtype is dtype
    relative = (
        [t / s for t, s in zip(ours, (1, 1 / scale, 1), strict=True)],
        [t / s for t, s in zip(exact, (1, 1 / scale, 1), strict=True)],
    )
    assert_near(*relative, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_with_a_residual_the_sum_is_returned_and_both_get_its_gradient(implementation):
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, weight = drawn((3, 70, 40), 0, dtype), drawn((3, 70, 40), 1, dtype), drawn(40, 2, dtype)
        up = [drawn(x.shape, 3), drawn(x.shape, 4)]
        with only_implementation(implementation):
            ours = gradients(lambda a, b, w: add_and_normalize(a, b, w, 1e-5), (x, residual, weight), up)

        def exact(a, b, w):
            total = (a + b).to(dtype).double() if dtype is torch.bfloat16 else a + b
            return norm.reference_normalize(total, w, 1e-5, 0.0), total

        expected = gradients(exact, (x.double(), residual.double(), weight.double()), up)
        assert_near(ours[:4], expected[:4], dtype)
        torch.testing.assert_close(ours[4].double(), expected[4], rtol=3e-2, atol=0.2)
        assert torch.equal(ours[2], ours[3])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_norm_to_int8_is_that_of_rounding_after_it(implementation):
    x, weight = drawn((33, 130)), drawn(130, 1)
    with only_implementation(implementation):
        codes, steps = normalize_quantized(x, weight, 1e-5)
    expected, sizes = quantize_activations(norm.reference_normalize(x, weight, 1e-5, 0.0))
    assert (codes.int() - expected.int()).abs().max() <= 1 and (codes != expected).float().mean() < 1e-3
    torch.testing.assert_close(steps, sizes, rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 40),
    heads=st.integers(1, 4),
    half=st.sampled_from([1, 3, 16, 33]),
    dtype=dtypes,
    seed=st.integers(0, 9),
)
def test_heads_are_rotated_by_their_positions_and_gradients_back(implementation, tokens, heads, half, dtype, seed):
    x, angles = drawn((tokens, heads, 2 * half), seed, dtype), drawn((50, 2 * half), seed + 1)
    positions = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(seed))
    up = [drawn(x.shape, seed + 2)]
    tables = angles.cos(), angles.sin()
    with only_implementation(implementation):
        ours = gradients(lambda x: rotate_heads(x, *tables, positions), (x,), up)
    exact = gradients(
        lambda x: rope.reference_rotate(x, *(t.double() for t in tables), positions, 1.0), (x.double(),), up
    )
    halves_alike = torch.cat([angles[:, :half]] * 2, -1)  # as tables are; only then is the way back a rotation
    assert_near(ours[:1], exact[:1], dtype)
    tables = halves_alike.cos(), halves_alike.sin()
    with only_implementation(implementation):
        ours = gradients(lambda x: rotate_heads(x, *tables, positions), (x,), up)
    exact = gradients(
        lambda x: rope.reference_rotate(x, *(t.double() for t in tables), positions, 1.0), (x.double(),), up
    )
    assert_near(ours, exact, dtype)


def test_the_rotation_is_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, angles = drawn((7, 2, 16)), drawn((7, 8), 1)
    angles = torch.cat([angles, angles], -1)
    theirs = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], q.transpose(0, 1)[None], angles.cos()[None], angles.sin()[None]
    )[0]
    torch.testing.assert_close(rotate_heads(q, angles.cos(), angles.sin(), torch.arange(7)), theirs[0].transpose(0, 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(shape=shapes, dtype=dtypes, kind=st.sampled_from(gates.KINDS), seed=st.integers(0, 9))
def test_gates_and_their_gradients(implementation, shape, dtype, kind, seed):
    gate, up = (drawn((*shape[0], shape[1]), seed + n, dtype, 2.0) for n in range(2))
    upstream = [drawn(gate.shape, seed + 2)]
    with only_implementation(implementation):
        ours = gradients(lambda e, g: gate_states(e, g, kind), (gate, up), upstream)
    exact = gradients(lambda e, g: gates.reference_gate(e, g, kind), (gate.double(), up.double()), upstream)
    assert_near(ours, exact, dtype)


@pytest.mark.parametrize("kind", gates.KINDS)
def test_gates_hold_far_from_zero(kind):
    gate = torch.tensor([-1e4, -100.0, -88.0, -20.0, 0.0, 20.0, 88.0, 100.0, 1e4])
    up = torch.full_like(gate, 3.0)
    ours = gradients(lambda e, g: gate_states(e, g, kind), (gate, up), [torch.ones_like(gate)])
    exact = gradients(
        lambda e, g: gates.reference_gate(e, g, kind), (gate.double(), up.double()), [torch.ones_like(gate)]
    )
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_torch_finds_their_registration_sound():
    x, weight = drawn((3, 20)).requires_grad_(), drawn(20, 1).requires_grad_()
    torch.library.opcheck(norm.FORWARD, (x, None, weight, 1e-5, 0.0))
    torch.library.opcheck(norm.FORWARD, (x, drawn((3, 20), 2).requires_grad_(), weight, 1e-5, 1.0))
    torch.library.opcheck(gates.FORWARD, (x, drawn((3, 20), 3).requires_grad_(), "silu"))
    angles = torch.cat([drawn((4, 5), 4)] * 2, -1)
    heads = drawn((3, 2, 10), 5).requires_grad_()
    torch.library.opcheck(rope.OPERATION, (heads, angles.cos(), angles.sin(), torch.tensor([0, 3, 1]), 1.0))


def test_threads_change_no_gradient_of_a_weight():
    x, weight = drawn((300, 64)), drawn(64, 1)
    made = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            made.append(gradients(normalize_rms, (x, weight), [drawn(x.shape, 2)]))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="expected one of"):
        gate_states(torch.ones(2), torch.ones(2), "tanh")
    with pytest.raises(ValueError, match="an even number"):
        rotate_heads(torch.ones(2, 1, 3), torch.ones(2, 3), torch.ones(2, 3), torch.arange(2))
