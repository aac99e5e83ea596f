"""Attention within documents against its reference in float64, in every implementation."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_kernels import only_implementation
from luthier_kernels.attention import attend_documents
from luthier_kernels.attention.documents import reference_attend
from luthier_kernels.native import has_native

NATIVE = pytest.param("native", marks=pytest.mark.skipif(not has_native("attention"), reason="no compiler"))
IMPLEMENTATIONS = ["torch", NATIVE]
# about 48 and 192 tokens blocks of the C form end, and about 16 its vectors
LENGTHS = st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 47, 48, 49, 97, 191, 193]), min_size=1, max_size=3)
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)])


def drawn(tokens, heads, size, seed=0, dtype=torch.bfloat16):
    """Return queries, keys, values and the gradient of the result."""
    random = torch.Generator().manual_seed(seed)
    counts = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(tokens, count, size, generator=random).to(dtype) for count in counts]


def starts_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)])


def differentiated(attend, inputs, upstream):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    result = attend(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream.to(result.dtype))]


def assert_near(ours, exact, share=0.02):
    for one, other in zip(ours, exact, strict=True):
        assert one.shape == other.shape
        assert float((one.double() - other).abs().max()) <= share * max(float(other.abs().max()), 1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS, heads=HEADS, size=st.sampled_from([16, 48, 64, 256]), seed=st.integers(0, 9))
def test_values_and_gradients_are_those_in_float64(implementation, lengths, heads, size, seed):
    *inputs, upstream = drawn(sum(lengths) + 1, heads, size, seed)
    starts, scale = starts_of([*lengths, 1]), size**-0.5
    with only_implementation(implementation):
        ours = differentiated(lambda q, k, v: attend_documents(q, k, v, starts, scale), inputs, upstream)
    wide = [tensor.double() for tensor in inputs]
    exact = differentiated(lambda q, k, v: reference_attend(q, k, v, starts, scale)[0], wide, upstream)
    assert_near(ours, exact)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_documents_and_later_tokens_do_not_see_each_other(implementation):
    *inputs, _ = drawn(60, (4, 2), 32)
    others = [tensor.clone() for tensor in inputs]
    for tensor in others:
        tensor[20:25] = 3.0
        tensor[50:] = 3.0
    starts = starts_of([25, 35])
    with only_implementation(implementation):
        first, second = (attend_documents(*given, starts, 0.2) for given in (inputs, others))
    same = [*range(20), *range(25, 50)]
    assert torch.equal(first[same], second[same])
    assert not torch.equal(first[50:], second[50:])


@NATIVE.marks[0]
def test_large_scores_neither_overflow_nor_lose_the_largest():
    query, key, value, _ = drawn(100, (2, 2), 16)
    query, key = query * 200, key * 200
    starts = starts_of([100])
    with only_implementation("native"):
        ours = attend_documents(query, key, value, starts, 1.0)
    wide = (tensor.double() for tensor in (query, key, value))
    assert_near([ours], [reference_attend(*wide, starts, 1.0)[0]])


@NATIVE.marks[0]
def test_a_number_that_is_none_shows_in_the_result():
    query, key, value, _ = drawn(40, (2, 2), 16)
    key[3, 0, 0] = torch.nan
    with only_implementation("native"):
        ours = attend_documents(query, key, value, starts_of([40]), 0.25)
    assert ours[3:, 0].isnan().all() and ours[:, 1].isfinite().all()


@NATIVE.marks[0]
def test_bits_do_not_depend_on_threads_nor_on_the_other_documents():
    *inputs, upstream = drawn(300, (4, 2), 64)

    def bits(given, lengths, gradient):
        with only_implementation("native"):
            starts = starts_of(lengths)
            return differentiated(lambda q, k, v: attend_documents(q, k, v, starts, 0.125), given, gradient)

    together = bits(inputs, [70, 130, 100], upstream)
    torch.set_num_threads(2)
    try:
        threaded = bits(inputs, [70, 130, 100], upstream)
    finally:
        torch.set_num_threads(1)
    alone = bits([tensor[70:200] for tensor in inputs], [130], upstream[70:200])
    for one, other, own in zip(together, threaded, alone, strict=True):
        assert torch.equal(one, other) and torch.equal(one[70:200], own)
