"""Ternary weights and int8 activations against their references: codes, scales, values, gradients."""

import ctypes
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_kernels import (
    expand_codes,
    multiply_ternary,
    only_implementation,
    quantize_activations,
    quantize_ternary,
)
from luthier_kernels.native import build, has_native
from luthier_kernels.ternary import activations, integers, linear, quantize
from luthier_kernels.ternary.groups import check_granularity, spread_scales
from luthier_kernels.ternary.packing import pack_columns
from torch._subclasses.fake_tensor import FakeTensorMode

IMPLEMENTATIONS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(not has_native("ternary"), reason="no compiler")),
]
granularities = st.sampled_from(["tensor", "row", 1, 5, 16, 64])


def a_matrix(rows, columns, seed=0, dtype=torch.float32, kind="plain"):
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "zeros":
        made[: (rows + 1) // 2] = 0
    if kind == "outlier" and made.numel():
        made[0, 0] = 1e4
    return made.to(dtype)


shapes = {"rows": st.integers(1, 20), "columns": st.sampled_from([1, 3, 16, 17, 63, 64, 65, 127, 257])}
contents = {"seed": st.integers(0, 99), "kind": st.sampled_from(["plain", "zeros", "outlier"])}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=80, deadline=None)
@given(
    **shapes, **contents, granularity=granularities, method=st.sampled_from(["absmean", "twn"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_codes_and_scales_are_those_of_the_formulas(
    implementation, rows, columns, seed, kind, granularity, method, dtype
):
    weight = a_matrix(rows, columns, seed, dtype, kind)
    with only_implementation(implementation):
        codes, scales = quantize_ternary(weight, granularity, method)
    expected, level = quantize.reference_quantize(weight.double(), check_granularity(granularity), method)
    torch.testing.assert_close(scales, level.float(), rtol=1e-6, atol=0)
    assert codes.dtype is torch.int8
    differs = codes != expected  # only where float32 and float64 fall on two sides of a threshold
    wide = spread_scales(level, columns, check_granularity(granularity))
    distance = (weight.double().abs() / wide - 0.5).abs()
    assert not differs.any() or method == "twn" or distance[differs].max() < 1e-5
    assert differs.float().mean() < 0.02


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("factor", [0.5, 1.7])
def test_a_factor_moves_the_threshold_and_the_scale_follows_the_method(implementation, factor):
    weight = a_matrix(24, 65)
    size, mean = weight.abs(), weight.abs().double().mean().float()
    with only_implementation(implementation):
        codes, scales = quantize_ternary(weight, "tensor", "absmean", factor)
        kept, levels = quantize_ternary(weight, "tensor", "twn", factor)
    torch.testing.assert_close(scales, (factor * mean).view(1, 1), rtol=1e-6, atol=0)
    assert torch.equal(codes.abs().bool(), size > factor * mean / 2) and torch.equal(codes.sign(), codes)
    above = size > factor * 0.75 * mean
    assert torch.equal(kept, (weight.sign() * above).to(torch.int8))
    torch.testing.assert_close(levels, size[above].double().mean().float().view(1, 1), rtol=1e-6, atol=0)


def test_absmean_is_that_of_transformers():
    from transformers.integrations.bitnet import WeightQuant

    weight = a_matrix(96, 130)
    codes, scales = quantize_ternary(weight)
    theirs = WeightQuant.forward.__wrapped__ if hasattr(WeightQuant.forward, "__wrapped__") else WeightQuant.forward
    torch.testing.assert_close(expand_codes(codes, scales), theirs(None, weight), rtol=1e-6, atol=0)


def test_twn_has_less_error_than_absmean_on_normal_weights():
    weight = a_matrix(256, 256)

    def error(method):
        return (expand_codes(*quantize_ternary(weight, method=method)) - weight).norm() / weight.norm()

    assert 0.42 < error("twn") < 0.45 < 0.50 < error("absmean") < 0.53


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=50, deadline=None)
@given(**shapes, **contents, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_activations_are_rounded_to_int8_for_each_row(implementation, rows, columns, seed, kind, dtype):
    states = a_matrix(rows, columns, seed, dtype, kind)
    with only_implementation(implementation):
        codes, steps = quantize_activations(states)
    expected, sizes = activations.reference_quantize(states)
    assert torch.equal(codes, expected) and torch.equal(steps, sizes)
    error = (codes * steps - states.float()).abs()
    assert (error <= steps * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(
    **shapes, seed=st.integers(0, 99), granularity=granularities, dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_codes_times_scales_is_rounded_once(implementation, rows, columns, seed, granularity, dtype):
    codes, scales = quantize_ternary(a_matrix(rows, columns, seed), granularity)
    with only_implementation(implementation):
        made = expand_codes(codes, scales, granularity, dtype)
    assert torch.equal(made, (codes * spread_scales(scales, columns, check_granularity(granularity))).to(dtype))


@settings(max_examples=60, deadline=None)
@given(
    **shapes,
    outputs=st.integers(1, 20),
    lead=st.sampled_from([(), (1,), (7,), (2, 3), (0,)]),
    granularity=granularities,
    integers=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_output_and_gradients_are_those_of_fake_quantization(
    rows, columns, outputs, lead, granularity, integers, dtype
):
    weight = a_matrix(outputs, columns).requires_grad_()
    codes, scales = quantize_ternary(weight, granularity)
    states = (torch.randn(*lead, columns) if lead else torch.randn(columns)).to(dtype).requires_grad_()
    output = multiply_ternary(states, weight, codes, scales, granularity, integers)
    upstream = torch.randn(output.shape).to(dtype)
    output.backward(upstream)

    group = check_granularity(granularity)
    exact = states.detach().double()
    expected = linear.reference_multiply(exact, codes, scales, group, integers)
    dense = codes.double() * spread_scales(scales.double(), columns, group)
    seen = exact
    if integers:
        rounded, steps = activations.reference_quantize(exact)
        seen = rounded * steps
    wide, up = seen.reshape(-1, columns), upstream.double().reshape(-1, outputs)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 0.1}
    assert output.dtype is dtype and weight.grad.dtype is torch.float32
    torch.testing.assert_close(output.double(), expected, **close)
    torch.testing.assert_close(states.grad.double().reshape(-1, columns), up @ dense, **close)
    torch.testing.assert_close(weight.grad.double(), up.t() @ wide, **close)


@settings(max_examples=40, deadline=None)
@given(**shapes, outputs=st.integers(1, 20), granularity=st.sampled_from(["tensor", "row"]), seed=st.integers(0, 99))
def test_the_forward_pass_in_integers_is_exact_to_the_last_bit(rows, columns, outputs, granularity, seed):
    states, weight = a_matrix(rows, columns, seed), a_matrix(outputs, columns, seed + 1)
    codes, scales = quantize_ternary(weight, granularity)
    rounded, steps = quantize_activations(states)
    sums = rounded.double() @ codes.double().t()  # exact
    expected = sums.float() * steps * scales.view(1, -1)
    assert torch.equal(multiply_ternary(states, weight, codes, scales, granularity), expected)


@pytest.mark.skipif(not has_native("decode"), reason="no compiler")
def test_a_processor_without_dot_products_computes_the_same_sums(tmp_path, monkeypatch):
    plain = tuple(flag for flag in build.FLAGS if flag != "-march=native")
    monkeypatch.setattr(build, "FLAGS", plain)
    build._compile(build._read_source("decode"), shutil.which("cc") or shutil.which("gcc"), tmp_path / "plain.so")
    library = ctypes.CDLL(str(tmp_path / "plain.so"))
    for columns in (1, 63, 64, 129, 256, 700):
        states = torch.randint(-127, 128, (3, -(-columns // 256) * 256), dtype=torch.int8)
        states[:, columns:] = 0
        codes = torch.randint(-1, 2, (5, columns), dtype=torch.int8)
        steps, scales = torch.rand(3, 1), torch.rand(5, 1)
        for name, weight, seen in (
            ("multiply_codes", codes, states[:, :columns].contiguous()),
            ("multiply_packed", pack_columns(codes), states),
        ):
            here = integers.multiply_few(name, seen, weight, steps, scales, torch.float32)
            there = torch.empty(3, 5)
            given = (weight, seen, steps, scales, 1, 3, seen.shape[1], 0, 5, 5, True, there)
            getattr(library, name)(*map(build._to_c, given))
            assert torch.equal(here, there)


@pytest.mark.skipif(not integers.has_unit(), reason="no matrix unit")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(9, 64, 1), (32, 128, 32), (33, 192, 33), (95, 2048, 70)])
def test_the_matrix_unit_gives_the_bits_of_exact_sums(rows, columns, outputs, dtype):
    states = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    codes = torch.randint(-1, 2, (outputs, columns), dtype=torch.int8)
    steps = torch.rand(rows, 1)
    for scales in (torch.rand(1, 1), torch.rand(outputs, 1)):
        made = integers.multiply_integers(states, codes, steps, scales, dtype)
        sums = (states.double() @ codes.double().t()).float()
        assert torch.equal(made, (sums * steps * scales.view(1, -1)).to(dtype))


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("columns", [999, 1024])
def test_threads_share_the_weights_rows_and_change_nothing(rows, columns):
    states, codes = torch.randint(-127, 128, (rows, columns)).char(), torch.randint(-1, 2, (1031, columns)).char()
    steps, scales = torch.rand(rows, 1), torch.rand(1031, 1)
    threads, made = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            made.append(integers.multiply_integers(states, codes, steps, scales, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    sums = states.double() @ codes.double().t()
    assert torch.equal(made[0], (sums.float() * steps * scales.view(1, -1)).bfloat16())
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_backward_keeps_integers_and_no_activations():
    weight, kept = a_matrix(32, 64).requires_grad_(), []
    states = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        multiply_ternary(states, weight, *quantize_ternary(weight)).sum().backward()
    assert {(t.dtype, t.numel()) for t in kept} == {
        (torch.int8, 5 * 64), (torch.float32, 5), (torch.int8, 32 * 64), (torch.float32, 1)
    }  # fmt: skip


def test_only_wanted_gradients_are_computed():
    weight = a_matrix(8, 16)
    codes, scales = quantize_ternary(weight)
    states = torch.randn(3, 16, requires_grad=True)
    multiply_ternary(states, weight, codes, scales).sum().backward()
    assert states.grad is not None and weight.grad is None
    latent = weight.clone().requires_grad_()
    multiply_ternary(states.detach(), latent, codes, scales).sum().backward()
    assert latent.grad.shape == (8, 16)


def test_under_autocast_it_computes_in_its_dtype():
    weight = a_matrix(8, 16).requires_grad_()
    states = torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = multiply_ternary(states, weight, *quantize_ternary(weight))
    output.sum().backward()
    assert (output.dtype, states.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_torch_finds_its_registration_sound():
    weight = a_matrix(8, 20).requires_grad_()
    states = torch.randn(3, 20, requires_grad=True)
    torch.library.opcheck(quantize.OPERATION, (weight.detach(), -1, "absmean"))
    torch.library.opcheck(quantize.OPERATION, (weight.detach(), 7, "twn", 1.0))
    torch.library.opcheck(activations.OPERATION, (states.detach(),))
    for rounded in (True, False):
        torch.library.opcheck(linear.FORWARD, (states, weight, *quantize_ternary(weight), -1, rounded))


def test_it_is_traced_whole_by_compile_with_the_same_values():
    def step(states, weight):
        return multiply_ternary(states * 2, weight, *quantize_ternary(weight, "row"), "row").relu().sum()

    gradients = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        states, weight = torch.ones(4, 32).cumsum(1).requires_grad_(), a_matrix(8, 32).requires_grad_()
        run(states, weight).backward()
        gradients.append((states.grad, weight.grad))
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])


def test_threads_change_nothing():
    weight = a_matrix(700, 400)
    one = quantize_ternary(weight)
    torch.set_num_threads(3)
    try:
        several = quantize_ternary(weight)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one[0], several[0]) and torch.equal(one[1], several[1])


@pytest.mark.parametrize("granularity", ["column", 0, -3, None])
def test_a_granularity_that_does_not_exist_is_refused(granularity):
    with pytest.raises(ValueError, match="granularity: expected"):
        quantize_ternary(torch.randn(4, 4), granularity)


def test_a_method_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="absmean"):
        quantize_ternary(torch.randn(4, 4), method="median")


def test_codes_are_expanded_on_tensors_without_memory_too():
    with FakeTensorMode():
        codes, scales = quantize_ternary(torch.randn(48, 64), "row", "twn")
        assert expand_codes(codes, scales, "row").shape == (48, 64)  # written to its address, it would end the process
