"""The head against all logits in float64: values and gradients, over shapes, bends and what trains."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier_kernels import count_runs, forget_runs, only_implementation
from luthier_kernels.head import logprobs, score_labels

NEAR = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}
SIZES = st.sampled_from([1, 2, 7, 16, 17, 31])


def both(states, weight, bias, labels, bend, trains, function=score_labels, exact=False):
    """Log-probabilities and gradients of what trains."""
    leaves = [None if t is None else (t.double() if exact else t).clone() for t in (states, weight, bias)]
    for leaf, wanted in zip(leaves, (True, trains, trains), strict=True):
        if leaf is not None:
            leaf.requires_grad_(wanted)
    found = function(*leaves, labels, *bend)
    found.backward(torch.linspace(-1, 1, len(labels)).to(found.dtype))
    return [found.detach(), *(leaf.grad for leaf in leaves if leaf is not None and leaf.requires_grad)]


def differences(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        yield float((one.double() - other).abs().max()) / max(float(other.abs().max()), 1e-3)


@settings(max_examples=40, deadline=None)
@given(
    rows=SIZES, hidden=SIZES, vocabulary=st.sampled_from([1, 2, 33, 1024, 1031]), dtype=st.sampled_from(list(NEAR)),
    has_bias=st.booleans(), trains=st.booleans(), seed=st.integers(0, 9),
    bend=st.sampled_from([(1.0, None), (0.25, None), (1.5, 5.0), (1.0, 30.0)]),
    implementation=st.sampled_from(["torch", "native"]),
)  # fmt: skip
def test_it_is_the_log_softmax_of_all_logits(
    rows, hidden, vocabulary, dtype, has_bias, trains, seed, bend, implementation
):
    torch.manual_seed(seed)
    states, weight = torch.randn(rows, hidden).to(dtype), torch.randn(vocabulary, hidden).to(dtype) / 2
    bias = torch.randn(vocabulary).to(dtype) if has_bias else None
    labels = torch.randint(vocabulary, (rows,))
    expected = both(states, weight, bias, labels, bend, trains, logprobs.reference_score, exact=True)
    with only_implementation("torch" if dtype is torch.float64 else implementation):
        found = both(states, weight, bias, labels, bend, trains)
    assert max(differences(found, expected)) < NEAR[dtype]


@pytest.mark.parametrize("trains", [False, True])
def test_many_tiles_and_blocks_are_one_head(monkeypatch, trains):
    monkeypatch.setattr(logprobs, "ROWS", 8)
    monkeypatch.setattr(logprobs, "NARROWEST", 16)
    monkeypatch.setattr(logprobs, "ELEMENTS", {"cpu": 16, "cuda": 16})
    states, weight, bias = torch.randn(19, 5), torch.randn(70, 5), torch.randn(70)
    labels = torch.arange(19) * 3
    expected = both(states, weight, bias, labels, (1.0, 4.0), trains, logprobs.reference_score, exact=True)
    assert max(differences(both(states, weight, bias, labels, (1.0, 4.0), trains), expected)) < 2e-5


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), elements=st.integers(16, 128), trains=st.booleans())
def test_spans_of_unlike_lengths_have_room_for_their_tiles(rows, elements, trains):
    torch.manual_seed(rows)
    states, weight, labels = torch.randn(rows, 5), torch.randn(70, 5), torch.randint(70, (rows,))
    expected = both(states, weight, None, labels, (1.0, None), trains, logprobs.reference_score, exact=True)
    with pytest.MonkeyPatch.context() as patch:  # tiles as small as the model
        patch.setattr(logprobs, "ROWS", 8)
        patch.setattr(logprobs, "NARROWEST", 1)
        patch.setattr(logprobs, "ELEMENTS", {"cpu": elements})
        found = both(states, weight, None, labels, (1.0, None), trains)
    assert max(differences(found, expected)) < 2e-5


@pytest.mark.parametrize("size", [1e4, 1e-30])
def test_logits_of_any_size_stay_finite(size):
    states, weight, labels = torch.eye(3) * size, torch.eye(3), torch.tensor([0, 1, 0])
    expected = both(states, weight, None, labels, (1.0, None), False, logprobs.reference_score, exact=True)
    assert max(differences(both(states, weight, None, labels, (1.0, None), False), expected)) < 1e-6


@pytest.mark.parametrize("implementation", ["torch", "native"])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("masked", [slice(0, 32), slice(16, 48), slice(20, 70)], ids=str)
def test_a_tile_that_a_bias_masks_whole_adds_nothing(monkeypatch, implementation, trains, masked):
    monkeypatch.setattr(logprobs, "NARROWEST", 16)
    monkeypatch.setattr(logprobs, "ELEMENTS", {"cpu": 16, "cuda": 16})
    states, weight, bias = torch.randn(5, 4), torch.randn(70, 4), torch.randn(70)
    bias[masked] = -torch.inf
    labels = bias.isfinite().nonzero().squeeze(1)[:5]
    expected = both(states, weight, bias, labels, (1.0, None), trains, logprobs.reference_score, exact=True)
    with only_implementation(implementation):
        found = both(states, weight, bias, labels, (1.0, None), trains)
    assert max(differences(found, expected)) < 2e-5


@pytest.mark.parametrize("label", [-100, -1, 40, 500])
def test_a_label_outside_the_vocabulary_is_told(label):
    with pytest.raises(IndexError, match=f"label {label} at place 1 .* vocabulary of 40"):
        score_labels(torch.randn(3, 2), torch.randn(40, 2), None, torch.tensor([3, label, 4]))


@pytest.mark.parametrize("implementation", ["torch", "native"])
def test_a_label_that_no_tile_has_gives_no_number(implementation):
    states, weight, bend = torch.randn(3, 2), torch.randn(40, 2), logprobs.Bend(None, 1.0, 0.0)
    room = logprobs._room(states, weight)
    with only_implementation(implementation):  # the part after the look at the labels, which a GPU does without
        found = logprobs._score_block(states, weight, bend, torch.tensor([3, 40, 4]), room, ahead=False)[0]
    assert found.isnan().tolist() == [False, True, False]


def test_a_logit_that_is_no_number_is_none_of_ours_to_hide():
    states = torch.tensor([[1.0, 2.0], [float("nan"), 1.0]])
    found = score_labels(states, torch.randn(40, 2), None, torch.tensor([3, 4]))
    assert found.isfinite().tolist() == [True, False]


def test_no_tokens_give_no_numbers():
    states = torch.zeros(0, 4, requires_grad=True)
    found = score_labels(states, torch.randn(9, 4), None, torch.zeros(0, dtype=torch.long))
    found.sum().backward()
    assert found.shape == (0,) and states.grad.shape == (0, 4)


def test_it_says_what_ran_and_has_a_shape_for_the_compiler():
    forget_runs()
    states, weight, labels = torch.randn(5, 4), torch.randn(9, 4), torch.arange(5)
    score_labels(states, weight, None, labels)
    assert count_runs()["fold_tile"] == {"native": 1}
    for ahead in (False, True):
        torch.library.opcheck(logprobs.FORWARD, (states, weight, None, labels, 1.0, 0.0, ahead),
                              test_utils=("test_schema", "test_faketensor"))  # fmt: skip
