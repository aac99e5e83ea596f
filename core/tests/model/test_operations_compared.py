"""The comparison of an offered operation with its reference: on which part of a call, and what it lets pass."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.errors import LuthierError
from luthier.model.operations.guard import GuardedOperation
from luthier.model.operations.sample_calls import (
    ATTENDED,
    HEAD_ROWS,
    KEY_HEADS,
    OUTPUTS,
    ROWS,
    STEP,
    WORDS,
    cut_size,
    sample_call,
)
from luthier.model.operations.signatures import REFERENCES
from luthier.plugins.records import OperationRecord

EXTRAS = (1e-6, 0.0, False, None)


def guarded(operation, function, **changes):
    record = OperationRecord(
        name=f"own.{operation}",
        summary="Own.",
        operation=operation,
        build="own:build",
        predicate="own:fits",
        tolerance=1e-5,
    )
    return GuardedOperation(record=record, owner="own 1", function=function, reference=REFERENCES[operation], **changes)


def refused(guard, *arguments):
    with pytest.raises(LuthierError) as caught:
        guard.compute(*arguments)
    assert caught.value.code == "operation-differs"
    return str(caught.value)


# on which part


@given(size=st.integers(1, 10**5), limit=st.integers(1, 10**4))
def test_a_cut_size_keeps_its_remainder(size, limit):
    cut = cut_size(size, limit)
    assert cut == size if size <= limit else limit <= cut < limit + STEP
    assert cut <= size
    assert (size - cut) % STEP == 0


@pytest.mark.parametrize("shape", [(1, 2048, 16, 4), (1, 16, 2048, 4), (3, 2048, 4), (2048, 4)], ids=str)
def test_a_sampled_norm_has_the_first_tokens_wherever_they_stand(shape):
    x, weight = torch.randn(shape), torch.ones(4)
    cut, kept, *rest = sample_call("rms_norm", (x, weight, *EXTRAS))
    assert cut.shape == tuple(ROWS if size == 2048 else size for size in shape)
    assert torch.equal(cut, x[tuple(slice(size) for size in cut.shape)])
    assert kept is weight
    assert rest == [*EXTRAS]


def test_a_sampled_rotation_has_the_tables_of_its_tokens():
    query, key, cos, sin = (torch.randn(shape) for shape in ((1, 4, 700, 8), (1, 2, 700, 8), (1, 700, 8), (1, 700, 8)))
    cut = sample_call("rope", (query, key, cos, sin, None))
    tokens = cut_size(700, ROWS)
    assert [t.shape for t in cut[:4]] == [(1, 4, tokens, 8), (1, 2, tokens, 8), (1, tokens, 8), (1, tokens, 8)]
    whole = REFERENCES["rope"](query, key, cos, sin)
    torch.testing.assert_close(REFERENCES["rope"](*cut), tuple(t[:, :, :tokens] for t in whole))


@pytest.mark.parametrize("bias", [None, torch.arange(5000.0)])
def test_a_sampled_layer_has_its_first_tokens_and_outputs(bias):
    x, weight = torch.randn(1, 300, 3), torch.randn(5000, 3)
    cut = sample_call("linear", (x, weight, bias))
    outputs = cut_size(5000, OUTPUTS)
    whole = REFERENCES["linear"](x, weight, bias)
    torch.testing.assert_close(REFERENCES["linear"](*cut), whole[..., :outputs])
    assert OUTPUTS <= outputs < 5000


@settings(max_examples=15)
@given(tokens=st.integers(1, 400), vocabulary=st.sampled_from([1, 50, WORDS, WORDS + 1, 12288, 12289]), data=st.data())
def test_a_sampled_head_has_the_rows_of_its_labels(tokens, vocabulary, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    labels = torch.randint(vocabulary, (tokens,), generator=random)
    weight = torch.arange(float(vocabulary))[:, None]
    states, kept, bias, own, *rest = sample_call(
        "token_logprobs", (torch.randn(tokens, 1), weight, weight[:, 0], labels, 0.5, 3.0)
    )
    assert len(states) == len(own) == cut_size(tokens, HEAD_ROWS)
    assert len(kept) == cut_size(vocabulary, WORDS)
    assert torch.equal(kept[own, 0].long(), labels[: len(own)])
    assert torch.equal(kept[:, 0], bias)
    assert (bias.diff() > 0).all()
    assert rest == [0.5, 3.0]


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("continues", [None, torch.tensor([-1, 0, -1, 2, 2])])
@pytest.mark.parametrize("lengths", [(60, 100, 40, 300, 57), (9, 4, 1, 12, 20)])
def test_sampled_attention_has_its_first_tokens_and_heads(lengths, continues, prefix):
    tokens, starts = sum(lengths), torch.tensor([0, *itertools.accumulate(lengths)])
    query, key, value = (
        torch.randn(1, heads, tokens + before, 4) for heads, before in ((6, 0), (3, prefix), (3, prefix))
    )
    arguments = (query, key, value, starts, continues, 0.5)
    cut = sample_call("document_attention", arguments)
    count = cut_size(tokens, ATTENDED)
    assert cut[0].shape == (1, 4, count, 4) and cut[1].shape == cut[2].shape == (1, KEY_HEADS, prefix + count, 4)
    whole = REFERENCES["document_attention"](*arguments)
    torch.testing.assert_close(REFERENCES["document_attention"](*cut), whole[:, :count, :4])


def for_128_rows(x, weight, *rest):
    if x.shape[-2] % 128:
        raise RuntimeError("rows must be a multiple of 128")
    return REFERENCES["rms_norm"](x, weight, *rest)


@pytest.mark.parametrize("rows", [128, 640])
def test_an_operation_for_multiples_of_128_rows_is_compared_and_kept(rows):
    guard = guarded("rms_norm", for_128_rows)
    assert guard.compute(torch.randn(1, rows, 8), torch.ones(8), *EXTRAS) is not NotImplemented
    assert guard.num_compared == 1


def test_the_whole_call_is_compared_where_the_predicate_refuses_the_sample():
    shapes = []

    def long_only(x, weight, *rest):
        shapes.append(x.shape[-2])
        return REFERENCES["rms_norm"](x, weight, *rest)

    guard = guarded("rms_norm", long_only, supports=lambda device, dtype, shape: shape[-2] >= 1000)
    guard.compute(torch.randn(1, 2048, 8), torch.ones(8), *EXTRAS)
    assert shapes == [2048, 2048]
    assert guard.num_compared == 1


def test_the_whole_call_is_compared_where_the_operation_declines_the_sample():
    def large_only(states, weight, *rest):
        return NotImplemented if len(weight) < 9000 else REFERENCES["token_logprobs"](states, weight, *rest) + 1

    given = (torch.randn(4, 2), torch.randn(9100, 2), None, torch.tensor([0, 9099, 5, 7]), 1.0, None)
    assert len(sample_call("token_logprobs", given)[1]) < 9000
    assert "result 0" in refused(guarded("token_logprobs", large_only), *given)


# what it finds


def test_wrong_rows_after_the_first_64_are_found():
    def wrong_tail(x, weight, *rest):
        made = REFERENCES["rms_norm"](x, weight, *rest)
        return torch.cat([made[..., :64, :], made[..., 64:, :] * 0], -2)

    assert "result 0" in refused(guarded("rms_norm", wrong_tail), torch.randn(1, 2048, 8), torch.ones(8), *EXTRAS)


def test_a_wrong_second_tile_of_a_vocabulary_is_found():
    def one_tile(states, weight, bias, labels, *rest):
        kept = weight * (torch.arange(len(weight)) < 8192)[:, None]
        return REFERENCES["token_logprobs"](states, kept, bias, labels, *rest)

    given = (torch.randn(8, 4), 3 * torch.randn(20000, 4), None, torch.arange(8) + 9000, 1.0, None)
    assert "result 0" in refused(guarded("token_logprobs", one_tile), *given)


def frozen_only(change):
    def score(states, weight, bias, *rest):
        return NotImplemented if weight.requires_grad else change(states, weight, bias, *rest)

    return score


@pytest.mark.parametrize("trains", [False, True])
def test_a_head_for_frozen_weights_alone_is_compared(trains):
    sound = REFERENCES["token_logprobs"]
    given = (torch.randn(80, 16, requires_grad=trains), torch.randn(90, 16), None, torch.arange(80), 1.0, None)
    guard = guarded("token_logprobs", frozen_only(sound))
    torch.testing.assert_close(guard.compute(*given), sound(*given))
    assert guard.num_compared == 1
    assert "result 0" in refused(guarded("token_logprobs", frozen_only(lambda *a: sound(*a) * 7 - 3)), *given)
    still = frozen_only(lambda states, *rest: sound(states.detach(), *rest) + 0 * states.sum())
    assert "gradient of states" in refused(guarded("token_logprobs", still), *given)


def test_an_operation_without_gradients_is_compared_by_its_values():
    def values_only(x, weight, *rest):
        asked = x.requires_grad or weight.requires_grad
        return NotImplemented if asked else REFERENCES["rms_norm"](x, weight, *rest) * 2

    assert "result 0" in refused(guarded("rms_norm", values_only), torch.randn(3, 8), torch.ones(8), *EXTRAS)


def test_what_an_operation_declines_is_compared_when_it_is_taken():
    kinds = []
    guard = guarded("swiglu", lambda gate, up: NotImplemented if len(gate) < 3 else kinds.append(1) or gate * up)
    assert guard.compute(torch.ones(2, 4), torch.ones(2, 4)) is NotImplemented
    assert guard.num_compared == 0
    refused(guard, torch.ones(3, 4), torch.ones(3, 4))


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weights_gradient_of_three_percent_less_is_found(dtype):
    norm = REFERENCES["rms_norm"]
    given = (torch.randn(1, 64, 256, dtype=dtype), torch.randn(256), *EXTRAS)
    assert guarded("rms_norm", norm).compute(*given) is not NotImplemented
    wrong = guarded("rms_norm", lambda x, weight, *rest: norm(x, Scale.apply(weight, 0.97), *rest))
    assert "gradient of weight" in refused(wrong, *given)
