"""What the watch tells of runs that go wrong, and that it leaves those alone that do not."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.health.watch import ENOUGH, TOLD, TRIAL, Watch, fall


def curve(steps, start=4.0, end=2.0, noise=0.15, seed=0):
    """A loss that falls as training losses do, with the noise of small batches, which is a share of the loss."""
    random = np.random.default_rng(seed)
    fallen = end + (start - end) * np.exp(-np.arange(steps) / (steps / 4))
    return (fallen * np.exp(noise * random.standard_normal(steps))).tolist()


def watched(losses, norms=None, rates=None):
    watch, told = Watch(), []
    for step, loss in enumerate(losses, 1):
        norm = norms[step - 1] if norms else 1.0
        rate = rates[step - 1] if rates else 1e-3
        told += watch.see(step, loss, norm, rate, lambda step=step: [f"rows:{step}"])
    return told + watch.end(len(losses)), watch


def kinds(told):
    return [remark.kind for remark in told]


@given(st.integers(0, 10**6), st.floats(0.02, 0.25), st.sampled_from([80, 200, 400]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_run_that_learns_is_left_alone(seed, noise, steps):
    told, _ = watched(curve(steps, noise=noise, seed=seed))
    assert kinds(told) == []


def test_a_spike_is_told_with_its_step_its_factor_and_its_rows():
    losses = curve(100)
    losses[70] = 20.0
    told, watch = watched(losses)
    [spike] = told
    assert (spike.kind, spike.step, spike.facts["rows"]) == ("spike", 71, ["rows:71"])
    assert spike.facts["factor"] == pytest.approx(20.0 / spike.facts["median"], abs=0.01)
    assert watch.spikes == 1


def test_a_spike_does_not_hide_the_next_and_all_are_counted():
    losses = curve(200, noise=0.05)
    for step in range(30, 30 + 2 * (TOLD + 5), 2):
        losses[step] = 30.0
    told, watch = watched(losses)
    assert kinds(told) == ["spike"] * TOLD
    assert watch.spikes == TOLD + 5


def test_what_is_learnt_by_heart_may_rise_again_from_nearly_nothing():
    losses = [4.0 * 0.8**i for i in range(100)]
    losses[90] = 0.05
    assert watched(losses)[0] == []


def test_nothing_is_compared_before_there_is_enough_to_compare_with():
    assert watched([2.0] * (ENOUGH - 1) + [50.0])[0] == []


def test_the_first_steps_of_a_steep_run_are_no_spikes():
    assert watched([12.0, 11.0, 9.0, 7.0, *curve(60, start=6.0)])[0] == []


def test_a_run_that_its_first_steps_destroy_is_told_once():
    losses = [4.3, 67.0, 30.0, *(20.0 / (1 + 0.01 * i) for i in range(150))]
    told, _ = watched(losses)
    assert kinds(told) == ["diverged"]
    assert told[0].step == 33
    assert told[0].facts["first"] == 4.3


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_differ_much_are_no_divergence(seed):
    """Batches of one row, their losses spread as those of conversations are."""
    losses = np.random.default_rng(seed).lognormal(0.5, 0.6, 150).tolist()
    assert "diverged" not in kinds(watched(losses)[0])


def test_a_norm_that_grows_and_stays_is_told_once():
    told, _ = watched(curve(100), [1.0] * 60 + [30.0] * 40)
    assert kinds(told) == ["exploding"]
    assert told[0].step == 65
    assert told[0].facts["usual"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "norms",
    [
        [1.0] * 50 + [80.0] + [1.0] * 49,
        [0.02 * i for i in range(1, 101)],
        [1.0] * 20 + [0.01] * 60 + [0.3] * 20,
    ],
    ids=["one step", "from zero, as an adapter's", "back to where it began"],
)
def test_a_norm_that_does_not_run_away_is_left_alone(norms):
    assert watched(curve(100), norms)[0] == []


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_most_runs_that_learn_nothing_are_told_after_the_trial(seed):
    random = np.random.default_rng(seed)
    told, _ = watched((3.0 + 0.3 * random.standard_normal(2 * TRIAL + 10)).tolist())
    assert kinds(told) in ([], ["flat"])
    assert all(remark.step == 2 * TRIAL for remark in told)


def test_five_of_six_runs_that_learn_nothing_are_told():
    random = np.random.default_rng(0)
    found = [bool(watched((3.0 + 0.3 * random.standard_normal(2 * TRIAL)).tolist())[0]) for _ in range(200)]
    assert 0.75 < np.mean(found) < 0.92


def test_a_rising_loss_is_told_too():
    told, _ = watched([2.0 + 0.004 * i for i in range(2 * TRIAL)])
    assert kinds(told) == ["flat"]


def test_a_short_run_is_judged_at_its_end_and_a_very_short_one_not_at_all():
    assert kinds(watched([3.0, 3.1] * 40)[0]) == ["flat"]
    assert watched([3.0, 3.1] * 20)[0] == []


def test_steps_without_a_rate_do_not_count():
    rates = [0.0] * TRIAL + [1e-3] * 30
    assert watched([3.0, 3.1] * 65, rates=rates)[0] == []


def test_the_score_is_mann_and_whitneys_by_ranks_and_standard_where_nothing_falls():
    random = np.random.default_rng(3)
    early, late = random.normal(3.0, 1, 40), random.normal(2.6, 1, 50)
    ranks = np.argsort(np.argsort(np.concatenate([early, late]))) + 1
    wins = ranks[:40].sum() - 40 * 41 / 2  # Wilcoxon's sum of ranks
    assert fall(early.tolist(), late.tolist()) == pytest.approx((wins - 1000) / math.sqrt(2000 * 91 / 12), rel=1e-12)
    chance = [fall(*random.normal(size=(2, 50)).tolist()) for _ in range(300)]
    assert abs(np.mean(chance)) < 0.15
    assert 0.9 < np.std(chance) < 1.1


@given(st.integers(1, 230), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_a_watch_that_was_put_away_and_taken_out_again_tells_the_same(cut, seed):
    losses = curve(240, end=3.9, seed=seed)
    losses[200] = 50.0
    _, straight = watched(losses)
    first, told = Watch(), []
    for step, loss in enumerate(losses, 1):
        if step == cut:
            held, first = json.loads(json.dumps(first.state())), Watch()
            first.load_state(held)
        told += first.see(step, loss, 1.0, 1e-3)
    assert first.state() == straight.state()
