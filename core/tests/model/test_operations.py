"""Operations: each equals its reference in values and gradients, keeps little, and says once what computed it."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from luthier.model.operations.functions import list_implementations
from luthier.model.operations.install_operations import ordinary_operations
from luthier.model.operations.kernels import EAGER
from luthier.model.operations.signatures import REFERENCES, Implementation, Operations

PLAIN = Operations()
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}
DTYPES = st.sampled_from(list(BOUNDS))
SIZES = st.integers(0, 7)
FORMS = st.sampled_from([(0.0, True), (1.0, False), (0.0, False), (1.0, True)])


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def results(compute, inputs):
    """Outputs, and the gradients of inputs that want one, under random gradients of the outputs."""
    inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    outputs = compute(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [random(*y.shape, dtype=y.dtype, seed=9) for y in outputs])
    return [*outputs, *(x.grad for x in inputs if x.requires_grad)]


def check(operation, inputs, *settings, dtype):
    found = results(lambda *x: getattr(ordinary_operations(), operation)(*x, *settings), inputs)
    expected = results(lambda *x: getattr(PLAIN, operation)(*x, *settings), inputs)
    for mine, reference in zip(found, expected, strict=True):
        assert mine.dtype is reference.dtype
        torch.testing.assert_close(mine, reference, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


@settings(deadline=None, max_examples=40, derandomize=True)
@given(tokens=SIZES, width=st.integers(1, 9), form=FORMS, dtype=DTYPES)
def test_a_norm_equals_its_reference_for_every_shape_and_form(tokens, width, form, dtype):
    x, weight = random(2, tokens, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    check("rms_norm", [x.requires_grad_(), weight.requires_grad_()], 1e-5, *form, dtype=dtype)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(tokens=SIZES, width=st.integers(1, 9), form=FORMS, dtype=DTYPES)
def test_a_norm_with_its_residual_gives_both_and_both_gradients(tokens, width, form, dtype):
    x, residual = random(1, tokens, width, dtype=dtype), random(1, tokens, width, dtype=dtype, seed=2)
    weight = random(width, dtype=dtype, seed=1)
    check("add_rms_norm", [t.requires_grad_() for t in (x, residual, weight)], 1e-5, *form, dtype=dtype)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(tokens=SIZES, heads=st.integers(1, 3), half=st.integers(1, 4), strided=st.booleans(), dtype=DTYPES)
def test_query_and_key_are_turned_as_the_reference_turns_them(tokens, heads, half, strided, dtype):
    """Any tables, so that the two halves need not have the same angles."""
    query, key = random(2, tokens, heads, 2 * half, dtype=dtype), random(2, tokens, 1, 2 * half, dtype=dtype, seed=1)
    query, key = (x.transpose(1, 2) if strided else x.transpose(1, 2).contiguous() for x in (query, key))
    cos, sin = (random(1, tokens, 2 * half, dtype=dtype, seed=s) for s in (3, 4))
    check("rope", [query.requires_grad_(), key.requires_grad_(), cos, sin], dtype=dtype)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    tokens=SIZES, width=st.integers(1, 9), gate=st.sampled_from(["swiglu", "geglu"]), halves=st.booleans(), dtype=DTYPES
)
def test_a_gate_equals_its_reference_whether_its_inputs_lie_apart_or_in_one_tensor(tokens, width, gate, halves, dtype):
    both = random(1, tokens, 2 * width, dtype=dtype)
    parts = both.chunk(2, -1) if halves else [part.contiguous() for part in both.chunk(2, -1)]
    check(gate, [part.detach().requires_grad_() for part in parts], dtype=dtype)


@pytest.mark.parametrize("form", [(0.0, True), (1.0, False)])
def test_gradients_are_those_of_finite_differences(form):
    operations = ordinary_operations()
    x, residual, weight = (random(*shape, seed=s).requires_grad_() for s, shape in enumerate([(3, 4), (3, 4), (4,)]))
    assert torch.autograd.gradcheck(lambda *t: operations.add_rms_norm(*t, 1e-3, *form), (x, residual, weight))
    heads, tables = random(1, 2, 3, 4).requires_grad_(), [random(1, 3, 4, seed=s) for s in (1, 2)]
    assert torch.autograd.gradcheck(lambda q: operations.rope(q, q, *tables), (heads,))
    assert torch.autograd.gradcheck(operations.swiglu, (x, random(3, 4, seed=3).requires_grad_()))
    assert torch.autograd.gradcheck(operations.geglu, (x, random(3, 4, seed=3).requires_grad_()))


def test_a_second_derivative_is_refused_and_not_wrong():
    x = random(2, 4).requires_grad_()
    given = random(2, 4, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(ordinary_operations().swiglu(x, x), x, given, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        grad.sum().backward()


def test_rows_that_are_views_and_gradients_that_are_broadcast_are_right():
    wide, weight = random(4, 12), random(6, seed=1)
    inputs = [wide[:, ::2].requires_grad_(), weight.requires_grad_()]
    for operations in (ordinary_operations(), PLAIN):
        for x in inputs:
            x.grad = None
    found = torch.autograd.grad(ordinary_operations().rms_norm(*inputs, 1e-5).sum(), inputs)
    expected = torch.autograd.grad(PLAIN.rms_norm(*inputs, 1e-5).sum(), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_changes_nothing_between_the_products(autocast):
    x, weight = random(1, 5, 8, dtype=torch.float32), random(8, dtype=torch.float32, seed=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        check("add_rms_norm", [x.requires_grad_(), x.detach(), weight.requires_grad_()], 1e-5, dtype=torch.float32)
        check("swiglu", [x.detach().requires_grad_(), x.detach()], dtype=torch.float32)


def test_the_dtype_that_is_asked_for_is_the_results_alone():
    x, weight = random(5, 8, dtype=torch.float32).requires_grad_(), random(8, dtype=torch.float32, seed=1)
    total, normed = ordinary_operations().add_rms_norm(x, None, weight, 1e-5, dtype=torch.bfloat16)
    assert (total.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(normed, PLAIN.rms_norm(x, weight, 1e-5).bfloat16())
    normed.sum().backward()
    assert x.grad.dtype is torch.float32


def kept_bytes(compute):
    """Bytes that autograd keeps, each tensor once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compute()
    return sum(kept.values()), output


def test_backward_is_left_less_than_autograd_would_keep():
    x, other = (random(64, 32, dtype=torch.float32, seed=s).requires_grad_() for s in (0, 1))
    weight = random(32, dtype=torch.float32).requires_grad_()
    row = 64 * 32 * 4
    normed, _ = kept_bytes(lambda: ordinary_operations().rms_norm(x, weight, 1e-5))
    assert normed == row + 64 * 4 + 32 * 4  # x, one number for each row, the weight
    gated, _ = kept_bytes(lambda: ordinary_operations().swiglu(x, other))
    assert gated == 2 * row
    assert kept_bytes(lambda: PLAIN.rms_norm(x, weight, 1e-5))[0] > 2 * row
    assert kept_bytes(lambda: PLAIN.swiglu(x, other))[0] == 3 * row


def test_a_frozen_weight_costs_no_gradient():
    x, weight = random(4, 8).requires_grad_(), random(8, seed=1)
    ordinary_operations().rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is None
    assert not ordinary_operations().rms_norm(x.detach(), weight, 1e-5).requires_grad


# the registry


def doubled(gate, up):
    return 2 * REFERENCES["swiglu"](gate, up)


def test_the_first_implementation_that_supports_a_call_computes_it():
    operations = ordinary_operations()
    narrow = {"supports": lambda device, dtype, shape: dtype is torch.float32 and shape[-1] < 8}
    operations.prefer([Implementation(operation="swiglu", name="doubled", function=doubled, **narrow)])
    x, wide = random(3, 4, dtype=torch.float32), random(3, 8, dtype=torch.float32)
    torch.testing.assert_close(operations.swiglu(x, x), 2 * PLAIN.swiglu(x, x))
    torch.testing.assert_close(operations.swiglu(wide, wide), PLAIN.swiglu(wide, wide))
    torch.testing.assert_close(operations.swiglu(x.double(), x.double()), PLAIN.swiglu(x.double(), x.double()))
    assert operations.ran() == ["swiglu: doubled", "swiglu: eager"]


def test_the_reference_computes_where_nothing_else_does():
    operations = Operations(list_implementations("nowhere", EAGER, lambda *_: False))
    operations.swiglu(random(2, 2), random(2, 2))
    assert operations.ran() == ["swiglu: reference"]


def test_what_computed_an_operation_is_said_once(capsys):
    from luthier import logs

    logs.set_up("debug")
    try:
        operations = ordinary_operations()
        for _ in range(3):
            operations.swiglu(random(2, 2), random(2, 2))
    finally:
        logs.set_up("warning")
    assert capsys.readouterr().err.count("implementation=eager") == 1


def test_an_unknown_operation_has_no_implementation():
    with pytest.raises(AssertionError, match="no operation is called"):
        Implementation(operation="softmax", name="mine", function=doubled)
