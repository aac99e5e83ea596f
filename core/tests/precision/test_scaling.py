"""Dynamic loss scaling: a state machine, and real float16 steps whose gradients overflow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.errors import LuthierError
from luthier.health.monitor import Health
from luthier.precision.dtypes import Precision
from luthier.precision.loss_scaler import LEAST, LossScaler
from luthier.recipe import Recipe
from luthier.recipe.objects import Objects
from luthier.step.update import update_weights
from luthier.testing.worlds import tiny_model, tiny_tokenizer
from luthier.training.assemble import assemble_run
from luthier.training.loop import trace_target


def test_an_overflow_halves_the_scale_and_ends_the_row_of_good_steps():
    scaler = LossScaler(scale=8.0, good_steps=5)
    scaler.judge(False, step=1)
    assert (scaler.scale, scaler.good_steps, scaler.overflows) == (4.0, 0, 1)


def test_the_scale_doubles_after_its_interval_of_good_steps():
    scaler = LossScaler(scale=8.0, growth_interval=3)
    scales = []
    for step in range(7):
        scaler.judge(True, step)
        scales.append(scaler.scale)
    assert scales == [8.0, 8.0, 16.0, 16.0, 16.0, 32.0, 32.0]


@settings(deadline=None)
@given(outcomes=st.lists(st.booleans(), max_size=40), interval=st.integers(1, 4))
def test_it_goes_as_torchs_own_scaler_does(outcomes, interval):
    ours = LossScaler(scale=2.0**16, growth_interval=interval)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=interval)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    if 2.0**16 * 0.5 ** outcomes.count(False) < LEAST:
        return
    for step, finite in enumerate(outcomes):
        ours.judge(finite, step)
        theirs.scale(parameter.sum())  # makes its lazy state
        parameter.grad = torch.tensor([1.0 if finite else float("inf")])
        theirs.step(optimizer)
        theirs.update()
        assert ours.scale == theirs.get_scale()


def test_a_scale_that_no_gradient_survives_ends_the_run():
    scaler = LossScaler(scale=LEAST)
    with pytest.raises(LuthierError) as caught:
        scaler.judge(False, step=9)
    assert caught.value.code == "train-nonfinite"
    assert "precision: bf16" in caught.value.remedy


def test_its_state_comes_back():
    scaler = LossScaler(scale=4.0, good_steps=7, overflows=2)
    other = LossScaler()
    other.load_state(scaler.state())
    assert other == scaler


@pytest.fixture
def setup():
    """A float16 run on the CPU, which recipes may not ask for: the same steps, slower."""
    recipe = Recipe.from_dict({"model": "python:t", "data": "python:r", "global_batch_size": 4, "precision": "float32",
                               "max_tokens_per_device": 40, "num_train_epochs": 4, "learning_rate": 1e-2})  # fmt: skip
    rows = [{"prompt": f"{i}?", "completion": f"{i}"} for i in range(16)]
    made = assemble_run(recipe, Objects(model=tiny_model(), tokenizer=tiny_tokenizer(), data=rows)).setup
    made.precision = Precision.of(recipe, "fp16", torch.device("cpu"), made.optimizer_part)
    made.step.computing = made.precision.computing
    yield made
    made.undo.close()


def steps(setup, count):
    """The updates of `count` steps, and the weights after each."""
    done, weights = [], []
    for portion in setup.portions(0):
        if portion.step == count:
            break
        done.append(update_weights(setup, portion.step, portion))
        weights.append(torch.cat([p.detach().flatten() for p in setup.model.parameters()]))
    return done, weights


def test_a_step_whose_gradient_overflows_is_left_out_counted_and_tried_with_half_the_scale(setup):
    setup.precision.scaler.scale = 2.0**140  # infinite in float32
    before = torch.cat([p.detach().flatten() for p in setup.model.parameters()])
    (done,), (after,) = steps(setup, 1)
    assert (done.finite, done.overflowed) == (False, True)
    assert torch.equal(before, after)
    assert setup.precision.scaler.overflows == 1
    assert setup.precision.scaler.scale == 2.0**139


def test_an_overflow_is_no_fault_of_the_run(setup):
    setup.precision.scaler.scale = 2.0**140
    health = Health(setup.recipe, setup.adapter, setup.rates.peak, trace_target(setup))
    (done,), _ = steps(setup, 1)
    health.see(1, done, [])
    assert health.report()["skipped_steps"] == 0


def test_gradients_are_read_unscaled_and_the_norm_is_that_of_float32(setup):
    """Whoever reads them, the adapter and the norm's limit, reads what float32 would give, within float16's error."""
    norms, begun = {}, {name: value.clone() for name, value in setup.model.state_dict().items()}
    for scale in (1.0, 2.0**10):
        setup.model.load_state_dict(begun)
        setup.precision.scaler.scale = scale
        norms[scale] = steps(setup, 1)[0][0].grad_norm
    assert norms[1.0] == pytest.approx(norms[2.0**10], rel=0.05)


def test_scaled_float16_steps_learn(setup):
    done, _ = steps(setup, 16)
    taken = [d for d in done if d.finite]
    assert len(taken) >= 8
    assert taken[-1].loss < taken[0].loss
    assert setup.precision.state()["scaler"]["overflows"] == len(done) - len(taken)
