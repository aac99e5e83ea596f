"""Learning rates: our shapes against transformers' and torch's, and every setting with its effect."""

import pytest
import torch
from luthier.errors import LuthierError
from luthier.step.schedule.learning_rates import schedule_rates
from transformers import get_scheduler


def theirs(name, peak, total, warmup, settings=None):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=settings)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("ours", "name"),
    [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine"), ("polynomial", "polynomial"),
     ("inverse_sqrt", "inverse_sqrt"), ("cosine_with_restarts", "cosine_with_restarts")],
)  # fmt: skip
@pytest.mark.parametrize("warmup", [0, 5])
def test_a_schedule_is_what_transformers_calls_by_that_name(ours, name, warmup):
    assert schedule_rates(ours, 3e-4, 40, warmup, {}) == pytest.approx(
        theirs(name, 3e-4, 40, warmup), rel=1e-9, abs=1e-12
    )


def test_the_cosine_floor_is_transformers_cosine_with_min_lr():
    expected = theirs("cosine_with_min_lr", 1e-3, 30, 4, {"min_lr": 1e-4})
    assert schedule_rates("cosine", 1e-3, 30, 4, {"min_lr": 1e-4}) == pytest.approx(expected, rel=1e-9)
    assert schedule_rates("cosine", 1e-3, 30, 4, {"min_lr_ratio": 0.1}) == pytest.approx(expected, rel=1e-9)


def test_one_cycle_is_torchs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=50)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert schedule_rates("one_cycle", 2e-3, 50, 0, {}) == pytest.approx(expected, rel=1e-9)
    assert max(schedule_rates("one_cycle", 2e-3, 50, 0, {"pct_start": 0.1})) == pytest.approx(2e-3)


def test_a_decay_of_its_own_length_ends_at_the_floor_and_stays_there():
    found = schedule_rates("cosine", 1.0, 20, 0, {"decay_steps": 10, "min_lr_ratio": 0.2})
    assert found[10:] == pytest.approx([0.2] * 10)
    assert found[5] == pytest.approx(0.6)


def test_the_rate_is_continuous_where_the_warm_up_ends():
    found = schedule_rates("cosine", 1.0, 100, 10, {})
    assert found[10] == 1.0
    assert max(abs(a - b) for a, b in zip(found, found[1:], strict=False)) <= 0.1 + 1e-9


def test_a_schedule_of_torch_takes_its_own_settings():
    found = schedule_rates("ExponentialLR", 1.0, 4, 0, {"gamma": 0.5})
    assert found == [1.0, 0.5, 0.25, 0.125]


@pytest.mark.parametrize(
    ("name", "settings", "warmup", "code"),
    [
        ("cosin", {}, 0, "recipe-out-of-range"),
        ("cosine", {"min_ratio": 0.1}, 0, "recipe-unknown-option"),
        ("StepLR", {}, 0, "recipe-unknown-option"),
        ("StepLR", {"step_size": 2}, 3, "recipe-conflict"),
        ("one_cycle", {}, 3, "recipe-conflict"),
        ("reduce_lr_on_plateau", {}, 0, "recipe-out-of-range"),
    ],
)
def test_what_does_not_fit_is_refused(name, settings, warmup, code):
    with pytest.raises(LuthierError) as caught:
        schedule_rates(name, 1.0, 10, warmup, settings)
    assert caught.value.code == code
