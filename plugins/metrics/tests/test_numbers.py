"""Each metric against its definition, or the library that people compare with."""

import itertools
import math

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier_metrics import Bleu, Custom, ExactMatch, PassAtK, Rouge
from luthier_metrics.matching import CustomMetric, ExactMatchMetric, PassAtKMetric, same_number
from luthier_metrics.overlap import BleuMetric, RougeMetric

words = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "Mat,", "2.5"]), max_size=12).map(" ".join)
pairs = st.lists(st.tuples(words, words.filter(bool)), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(pairs, st.booleans(), st.sampled_from(["exp", "floor", "none"]))
def test_bleu_of_added_statistics_is_sacrebleus_of_the_corpus(pairs, lowercase, smooth):
    metric = BleuMetric(Bleu(lowercase=lowercase, smooth_method=smooth))
    totals = [sum(column) for column in zip(*(metric.score_answers([p], r) for p, r in pairs), strict=True)]
    predictions, references = zip(*pairs, strict=True)
    told = {"lowercase": lowercase, "smooth_method": smooth}
    expected = sacrebleu.corpus_bleu(list(predictions), [list(references)], **told).score
    assert metric.conclude(totals) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(data, count):
    k = data.draw(st.integers(1, count))
    right = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    metric = PassAtKMetric(PassAtK(k=k, num_answers=count))
    found, weight = metric.score_answers(["yes" if each else "no" for each in right], "yes")
    subsets = list(itertools.combinations(right, k))
    assert weight == 1
    assert found == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_exact_match_looks_past_what_it_is_told_to():
    plain, loose = (
        ExactMatchMetric(ExactMatch()),
        ExactMatchMetric(ExactMatch(ignore_case=True, ignore_punctuation=True)),
    )
    assert plain.score_answer(" a  b", "a b") == (1.0, 1.0)
    assert plain.score_answer("A b!", "a b") == (0.0, 1.0)
    assert loose.score_answer("A b!", "a b") == (1.0, 1.0)


def test_rouge_is_the_harmonic_mean_of_both_shares():
    metric = RougeMetric(Rouge(kind="rouge1"))
    precision, recall = 2 / 3, 2 / 4
    assert metric.score_answer("the cat ran", "the cat sat down")[0] == pytest.approx(
        2 * precision * recall / (precision + recall)
    )
    assert RougeMetric(Rouge(kind="rouge1", use_stemmer=True)).score_answer("walking", "walked")[0] == 1.0
    assert RougeMetric(Rouge(kind="rougeL")).score_answer("b a", "a b")[0] == 0.5


def test_the_last_numbers_are_compared():
    assert same_number("first 3, then 1,200.0", "#### 1200")
    assert not same_number("12", "13")
    assert not same_number("none", "none")


def test_a_function_of_the_users_is_averaged():
    metric = CustomMetric(Custom(function="operator:eq"))
    assert metric.score_answer("a", "a") == (1.0, 1.0)
    assert metric.score_answer("a", "b") == (0.0, 1.0)


@pytest.mark.parametrize(
    ("function", "code"),
    [("operator", "recipe-out-of-range"), ("no.such:thing", "part-unknown"), ("math:pi", "part-invalid")],
)
def test_what_is_no_function_is_refused_by_name(function, code):
    with pytest.raises(LuthierError) as caught:
        CustomMetric(Custom(function=function))
    assert caught.value.code == code
    assert function in str(caught.value)


def test_a_function_that_gives_no_number_is_named():
    metric = CustomMetric(Custom(function="operator:add"))
    with pytest.raises(LuthierError, match="operator:add"):
        metric.score_answer("a", "b")


def test_more_answers_are_not_asked_of_fewer():
    with pytest.raises(LuthierError, match="num_answers"):
        PassAtK(k=3, num_answers=2)
    assert math.isclose(PassAtK(k=2, num_answers=2).temperature, 0.8)
