"""The measures of continual training, against numbers worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier.training.continual.transfer import measure_transfer

SCORES = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.6, 0.5, 0.9]]
BASE = [0.1, 0.1, 0.2]


def test_the_measures_of_three_tasks_are_those_of_the_papers():
    found = measure_transfer(SCORES, BASE)
    assert found.average == pytest.approx((0.6 + 0.5 + 0.9) / 3)
    assert found.backward == pytest.approx(((0.6 - 0.9) + (0.5 - 0.8)) / 2)
    assert found.forward == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)
    assert found.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.5)) / 2)


def test_of_a_loss_a_rise_is_forgetting():
    found = measure_transfer([[1.0, 3.0], [1.5, 0.5]], [4.0, 4.0], greater_is_better=False)
    assert (found.backward, found.forgetting, found.forward) == (-0.5, 0.5, 1.0)


def test_one_task_has_an_average_alone():
    found = measure_transfer([[0.5]])
    assert (found.average, found.backward, found.forward, found.forgetting) == (0.5, None, None, None)


@given(
    st.integers(2, 5).flatmap(
        lambda n: st.lists(st.lists(st.floats(-5, 5), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_a_loss_is_its_negative_as_a_gain(scores):
    negative = [[-value for value in row] for row in scores]
    gain, loss = measure_transfer(scores), measure_transfer(negative, greater_is_better=False)
    assert gain.backward == pytest.approx(loss.backward) and gain.forgetting == pytest.approx(loss.forgetting)
