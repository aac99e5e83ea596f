"""The model as a benchmark asks it: its scores are those of the plain model, whatever shares a pass."""

import pytest
import torch
from luthier import BenchmarkModel
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model, tiny_tokenizer

torch.set_num_threads(1)

PAIRS = [([5, 6, 7], [8, 9]), ([1], [2]), ([9, 8, 7, 6, 5], [4, 3, 2]), ([3, 3], [3])]


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def expected(model, context, continuation):
    """The score by the model's own forward over one text."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)[len(context) - 1 : -1]
    likeliest = logprobs.argmax(-1).tolist() == list(continuation)
    return float(logprobs.gather(1, torch.tensor(continuation)[:, None]).sum()), likeliest


@pytest.mark.parametrize("max_tokens", [1, 8, 4096])
def test_scores_are_those_of_the_plain_model_whatever_shares_a_pass(model, max_tokens):
    before = model.config._attn_implementation
    found = BenchmarkModel(model=model, tokenizer=tiny_tokenizer(), max_tokens=max_tokens).score_tokens(PAIRS)
    assert model.config._attn_implementation == before
    for score, (context, continuation) in zip(found, PAIRS, strict=True):
        assert score == (pytest.approx(expected(model, context, continuation)[0], abs=1e-4),
                         expected(model, context, continuation)[1])  # fmt: skip


def test_the_likeliest_continuation_is_known_as_such(model):
    asked = BenchmarkModel(model=model, tokenizer=tiny_tokenizer())
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    assert asked.score_tokens([([5, 6, 7], [best])])[0][1]
    assert not asked.score_tokens([([5, 6, 7], [best - 1])])[0][1]


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1] * 4000, [1])])
def test_a_pair_that_cannot_be_scored_is_refused(model, pair):
    with expect_error("part-invalid", "BenchmarkModel.score_tokens"):
        BenchmarkModel(model=model, tokenizer=tiny_tokenizer()).score_tokens([pair])


def test_an_answer_ends_before_the_first_of_its_texts(model):
    asked = BenchmarkModel(model=model, tokenizer=tiny_tokenizer())
    prompts = [[5, 6, 7], [40, 41, 42, 43]]
    whole = asked.answer_prompts(prompts, most=8)
    signs = [next(sign for sign in text[1:] if sign not in (text[0], "\ufffd")) for text in whole]
    for sign, number in zip(signs, (0, 1), strict=True):
        cut = asked.answer_prompts(prompts, most=8, until=[sign, "never stands there"])
        assert cut[number] == whole[number][: whole[number].index(sign)]


def test_drawn_answers_follow_from_the_seed(model):
    def drawn(seed):
        asked = BenchmarkModel(model=model, tokenizer=tiny_tokenizer(), seed=seed)
        return asked.answer_prompts([[5, 6, 7]] * 2, most=6, temperature=2.0)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(7)
    assert drawn(1)[0] != drawn(1)[1]
