"""Packed attention: each document as if it were alone, in every architecture."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from luthier.data.batches.batch import Batch
from luthier.errors import LuthierError
from luthier.model.attention import attend_documents, generating_attention, install_attention
from luthier.model.policy import ModelPolicy
from luthier.testing.worlds import ARCHITECTURES, random_batch, tiny_model


def starts_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def dense_reference(q, k, v, starts, window, softcap, continues=None):
    """One masked softmax over the whole row, in float64."""
    total = q.shape[2]
    document = torch.zeros(total, dtype=torch.int64)
    for d in range(len(starts) - 1):
        document[starts[d] : starts[d + 1]] = d
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    place = torch.arange(total)
    allowed = (document[:, None] == document[None]) & (place[None] <= place[:, None])
    if window is not None:
        allowed &= place[None] > place[:, None] - window
    for d, parent in enumerate([] if continues is None else continues.tolist()):
        if parent >= 0:
            allowed |= (document[:, None] == d) & (document[None] == parent)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v).transpose(1, 2)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    groups=st.sampled_from([1, 2]),
    window=st.sampled_from([None, 1, 3, 50]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_attention_over_documents_equals_a_masked_softmax_in_float64(lengths, groups, window, softcap):
    random = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    q = torch.randn(1, 2 * groups, total, 4, dtype=torch.float64, generator=random)
    k, v = (torch.randn(1, 2, total, 4, dtype=torch.float64, generator=random) for _ in range(2))
    starts = starts_of(lengths)
    found, _ = attend_documents(
        torch.nn.Module(), q, k, v, None, sliding_window=window, softcap=softcap, cu_seq_lens_k=starts
    )
    torch.testing.assert_close(found, dense_reference(q, k, v, starts, window, softcap), rtol=1e-10, atol=1e-10)


def test_a_document_that_continues_another_sees_its_tokens():
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    starts, continues = starts_of([4, 2, 3]), torch.tensor([-1, 0, 0])
    found, _ = attend_documents(torch.nn.Module(), q, k, v, None, cu_seq_lens_k=starts, continues=continues)
    torch.testing.assert_close(found, dense_reference(q, k, v, starts, None, None, continues), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("broken", ["untold", "masked", "cached", "padded", "sinks"])
def test_attention_raises_where_it_would_be_wrong(broken):
    q = k = v = torch.randn(1, 2, 5, 4)
    told, mask = {"cu_seq_lens_k": starts_of([5])}, None
    if broken == "untold":
        told = {}
    if broken == "masked":
        mask = torch.ones(1, 1, 5, 5)
    if broken == "cached":
        q = q[:, :, -1:]
    if broken == "padded":
        q = k = v = torch.randn(2, 2, 5, 4)
    if broken == "sinks":
        told["s_aux"] = torch.zeros(2)
    with pytest.raises(LuthierError) as caught:
        attend_documents(torch.nn.Module(), q, k, v, mask, **told)
    assert caught.value.code == "model-architecture"


def own_logprobs(model, batch: Batch) -> torch.Tensor:
    """[T] by the model's own forward over each document alone."""
    found = torch.zeros(batch.num_tokens)
    for start, end in zip(batch.document_starts[:-1].tolist(), batch.document_starts[1:].tolist(), strict=True):
        ids = batch.input_ids[None, start:end]
        logprobs = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].log_softmax(-1)
        for t in range(start + 1, end):
            if batch.labels[t] >= 0:
                found[t] = logprobs[t - 1 - start, batch.labels[t]]
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_documents_equal_separate_ones_in_values_and_gradients(architecture):
    packed, plain = tiny_model(architecture).eval(), tiny_model(architecture).eval()
    plain.set_attn_implementation("eager")
    install_attention(packed)
    batch = random_batch((20, 9, 1, 33, 2))
    found = ModelPolicy(packed).token_logprobs(batch)
    found.sum().backward()
    expected = own_logprobs(plain, batch)
    expected.sum().backward()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    for (name, mine), theirs in zip(packed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=2e-5, msg=name)


def test_installing_leaves_a_shared_config_alone():
    model = tiny_model()
    config = model.config
    install_attention(model)
    assert config._attn_implementation != "luthier"
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_generation_uses_ordinary_attention_and_gives_the_packed_one_back():
    model = tiny_model()
    install_attention(model)
    ids = torch.tensor([[5, 6, 7]])
    with generating_attention(model):
        assert model.config._attn_implementation == "sdpa"
        assert not model.training
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert model.config._attn_implementation == "luthier"
    assert model.training
