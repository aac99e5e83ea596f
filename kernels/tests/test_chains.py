"""Attention of documents that continue others, as chains of plain documents, against the engine's reference."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.model.operations.signatures import REFERENCES
from luthier_kernels.attention.chains import attend_chains


@st.composite
def drawn_documents(draw):
    """(lengths, links) of documents, each of which continues none or one before it."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    return lengths, [draw(st.integers(-1, number - 1)) for number in range(len(lengths))]


def differentiated(attend, tokens, seed):
    """Return the result [T, heads, D] of `attend` and its gradients, from tensors that `seed` decides."""
    random = torch.Generator().manual_seed(seed)
    leaves = [
        torch.randn(tokens, heads, 4, generator=random, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    ]
    result = attend(*leaves)
    upstream = torch.randn(result.shape, generator=random, dtype=torch.float64)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]


@settings(max_examples=60, deadline=None)
@given(documents=drawn_documents(), seed=st.integers(0, 9))
def test_values_and_gradients_are_the_references(documents, seed):
    lengths, links = documents
    starts = [0, *itertools.accumulate(lengths)]

    def refer(query, key, value):
        heads = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return REFERENCES["document_attention"](*heads, torch.tensor(starts), torch.tensor(links), 0.5)[0]

    if attend_chains(*(torch.zeros(starts[-1], 1, 4) for _ in range(3)), starts, links, 0.5) is None:
        return
    ours = differentiated(lambda q, k, v: attend_chains(q, k, v, starts, links, 0.5), starts[-1], seed)
    for one, other in zip(ours, differentiated(refer, starts[-1], seed), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_many_short_documents_that_continue_a_long_one_are_left_to_another_form():
    starts = [0, 60, *range(62, 80, 2)]
    inputs = [torch.zeros(starts[-1], 1, 4) for _ in range(3)]
    links = [-1, *[0] * (len(starts) - 2)]
    assert attend_chains(*inputs, starts, links, 0.5) is None
    assert attend_chains(*(tensor[:62] for tensor in inputs), starts[:3], links[:2], 0.5) is not None
