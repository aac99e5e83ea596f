"""Tuning by validation: what is kept and taken back, in which order, and what a state holds of it."""

import pytest
import torch
from luthier import Progress
from luthier.testing import expect_error
from luthier.testing.contexts import context
from luthier.testing.worlds import tiny_model
from luthier_bitnet import Bitnet, Qat, RangeTuning, Schedule, Ternary, Tuning
from luthier_bitnet.choices import Choice
from luthier_bitnet.quantizer import TernaryQuantizer, find_layers
from luthier_bitnet.uniform.quantizer import UniformQuantizer, find_uniform


def prepared(**tuning):
    model = tiny_model().eval()
    part = UniformQuantizer(Qat(bits=4, tuning=Tuning(**tuning)))
    return part, list(find_uniform(part.apply(model, context(model))).items())


def answering(*losses):
    """An evaluation that gives these losses, one after the other."""
    left = iter(losses)
    return lambda: {"eval_loss": next(left)}


def test_another_range_is_kept_only_where_the_loss_falls_by_enough():
    part, layers = prepared(factors=[0.5, 2.0], min_gain=0.1)
    dense = layers[0][1].dense()
    assert part.tune({"eval_loss": 1.0}, answering(0.95, 0.89)) == {"eval_loss": 0.89}
    assert layers[0][1].choice == Choice(factor=2.0)  # 0.95 is not a tenth less
    fresh, (layer, *_) = (f := prepared(factors=[2.0]))[0], [v for _, v in f[1]]
    fresh.tune({"eval_loss": 1.0}, answering(0.9))
    assert not torch.equal(layer.dense(), dense) and torch.equal(layer.dense(), layers[0][1].dense())
    assert len(layer.dense()[0].unique()) < len(dense[0].unique())  # the outermost levels are empty
    assert all(other.choice == Choice() for _, other in layers[1:])


def test_layers_have_their_turn_one_after_the_other_and_from_the_start_again():
    part, layers = prepared(factors=[2.0], layers=len_of_layers() - 1)
    part.tune({"eval_loss": 1.0}, answering(*[1.0 - i / 100 for i in range(1, len(layers))]))
    assert [layer.choice.factor for _, layer in layers] == [2.0] * (len(layers) - 1) + [1.0]
    part.tune({"eval_loss": 0.5}, answering(*[0.5 - i / 100 for i in range(1, len(layers))]))
    assert [layer.choice.factor for _, layer in layers] == [4.0] * (len(layers) - 2) + [2.0, 2.0]


def len_of_layers():
    return len(prepared(factors=[2.0])[1])


def test_fewer_bits_are_kept_while_the_loss_rises_by_no_more_than_is_allowed():
    part, layers = prepared(bits=[1.58, 2], max_rise=0.05)
    part.tune({"eval_loss": 2.0}, answering(2.1, 2.3))
    assert layers[0][1].choice.bits == 2 and len(layers[0][1].dense()[0].unique()) <= 4
    part, layers = prepared(bits=[1.58, 2])
    part.tune({"eval_loss": 2.0}, answering(2.1))  # and 1.58 is not tried
    assert layers[0][1].choice.bits == 0
    part.tune({"eval_loss": 2.0}, answering(2.0, 2.01))
    assert layers[1][1].choice.bits == 1.58 and len(layers[1][1].dense()[0].unique()) == 3
    part.tune({"eval_loss": 2.0}, answering(float("nan")))
    assert layers[2][1].choice == Choice()


def test_a_cut_evaluation_takes_back_all_that_the_same_turn_has_kept():
    part, layers = prepared(factors=[0.5], layers=3)
    before = [layer.dense() for _, layer in layers]
    with pytest.raises(StopIteration):
        part.tune({"eval_loss": 1.0}, answering(0.9, 0.8))
    assert all(torch.equal(layer.dense(), old) for (_, layer), old in zip(layers, before, strict=True))
    part.tune({"eval_loss": 1.0}, answering(0.9, 1.9, 0.8))
    assert [layer.choice.factor for _, layer in layers[:3]] == [0.5, 1.0, 0.5]


def test_a_state_and_a_state_dict_carry_what_was_kept():
    part, layers = prepared(factors=[0.7], bits=[1.58])
    part.tune({"eval_loss": 1.0}, answering(0.9, 0.9))
    other, others = prepared(factors=[0.7], bits=[1.58])
    other.load_state(part.state())
    assert others[0][1].choice == layers[0][1].choice and other.tuner.tried == 1
    assert torch.equal(others[0][1].dense(), layers[0][1].dense())
    _, third = prepared(factors=[0.7], bits=[1.58])
    third[0][1].load_state_dict(layers[0][1].state_dict())
    assert third[0][1].choice == layers[0][1].choice and third[0][1].choice.bits == 1.58


def prepared_ternary(options):
    model = tiny_model().eval()
    part = TernaryQuantizer(options)
    return part, list(find_layers(part.apply(model, context(model))).values())


@pytest.mark.parametrize("kind", [Ternary, Bitnet])
def test_ternary_layers_keep_the_threshold_that_helps_and_take_back_all_others(kind):
    part, layers = prepared_ternary(kind(tuning=RangeTuning(factors=[0.5, 1.5], layers=2, min_gain=0.01)))
    assert part.needs_metrics == {"tuning": "eval_loss"}
    dense, zeros = layers[0].dense(), float((layers[0].dense() == 0).float().mean())
    other = layers[1].dense()
    assert part.tune({"eval_loss": 1.0}, answering(0.995, 0.9, 0.9, 1.0)) == {"eval_loss": 0.9}
    assert layers[0].choice == Choice(factor=1.5) and float((layers[0].dense() == 0).float().mean()) > zeros
    assert torch.equal(layers[1].dense(), other) and part.tuner.tried == 2
    second, fresh = prepared_ternary(kind(tuning=RangeTuning(factors=[0.5, 1.5])))
    second.load_state(part.state())
    assert torch.equal(fresh[0].dense(), layers[0].dense()) and not torch.equal(fresh[0].dense(), dense)
    assert second.tuner.tried == 2
    with pytest.raises(StopIteration):
        part.tune({"eval_loss": 0.9}, answering(0.5))
    assert [layer.choice for layer in layers[2:]] == [Choice()] * len(layers[2:]) and part.tuner.tried == 2


def test_a_tuned_layer_is_read_where_nothing_is_tuned():
    part, layers = prepared_ternary(Ternary(tuning=RangeTuning(factors=[2.0])))
    part.tune({"eval_loss": 1.0}, answering(0.5))
    plain, fresh = prepared_ternary(Ternary())
    assert not plain.needs_metrics and "chosen" not in fresh[0].state_dict() and not plain.state()["tuning"]
    fresh[0].load_state_dict(layers[0].state_dict())
    assert torch.equal(fresh[0].dense(), layers[0].dense()) and "chosen" in fresh[0].state_dict()


@pytest.mark.parametrize("part", [
    TernaryQuantizer(Ternary(schedule=Schedule(end_step=4), tuning=RangeTuning(factors=[0.5]))),
    UniformQuantizer(Qat(schedule=Schedule(end_step=4), tuning=Tuning(bits=[2]))),
])  # fmt: skip
def test_nothing_is_tried_before_weights_are_wholly_rounded(part):
    model = tiny_model().eval()
    part.apply(model, context(model))
    for step in (0, 2, 4):
        part.progressed(Progress(step=step, total_steps=8, epoch=0.0))
        gains = answering(*([0.5] if step == 4 else []))
        assert part.tune({"eval_loss": 1.0}, gains) == {"eval_loss": 0.5 if step == 4 else 1.0}


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"bits": 2, "tuning": {"bits": [4]}}, "tuning.bits"),
        ({"learn_scale": True, "tuning": {"factors": [0.9]}}, "tuning"),
        ({"bits_stages": [8], "tuning": {"bits": [2]}}, "tuning.bits"),
        ({"symmetric": False, "tuning": {"bits": [1]}}, "symmetric"),
    ],
)
def test_a_tuning_that_cannot_be_is_refused(options, where):
    with expect_error("recipe-conflict", where):
        Qat(**options)
