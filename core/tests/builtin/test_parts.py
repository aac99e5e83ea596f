"""The built-in parts: groups by role, decay where it belongs, a plot one can look at."""

from types import SimpleNamespace

import pytest
import torch
from luthier.builtin import AdamW, EarlyStopping, Sgd
from luthier.builtin.early_stopping import Stopper
from luthier.builtin.full import FullTuning
from luthier.builtin.optimizers import FusedAdamW, MomentumSgd
from luthier.errors import LuthierError
from luthier.plugins.records import NoOptions
from luthier.runs.metrics_file import read_metrics
from luthier.runs.picture import averaged, draw_picture
from luthier.testing import expect_error
from luthier.testing.contexts import context
from luthier.testing.worlds import ARCHITECTURES, tiny_model


def full(model):
    adapter = FullTuning(NoOptions())
    adapter.attach(model, context(model))
    return adapter


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_in_exactly_one_group(architecture):
    model = tiny_model(architecture)
    grouped = [id(p) for g in full(model).groups() for p in g.parameters]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_norms_and_biases_do_not_decay_and_the_rest_does():
    model = tiny_model("qwen2")
    optimizer = FusedAdamW(AdamW(weight_decay=0.1)).build(full(model).groups())
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        spared = name.endswith("bias") or "norm" in name
        assert decays[id(parameter)] == (0.0 if spared else 0.1), name


@pytest.mark.parametrize(
    ("build", "their_class", "given"),
    [
        (lambda: FusedAdamW(AdamW(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, amsgrad=True)), torch.optim.AdamW,
         {"betas": (0.8, 0.9), "eps": 1e-6, "amsgrad": True}),
        (lambda: MomentumSgd(Sgd(momentum=0.7, nesterov=True)), torch.optim.SGD, {"momentum": 0.7, "nesterov": True}),
    ],
)  # fmt: skip
def test_every_option_reaches_torchs_optimizer(build, their_class, given):
    optimizer = build().build(full(tiny_model()).groups())
    assert type(optimizer) is their_class
    for group in optimizer.param_groups:
        assert given.items() <= group.items()


def test_full_tuning_keeps_no_base_to_go_back_to():
    with pytest.raises(LuthierError) as caught, full(tiny_model()).disabled():
        pass
    assert caught.value.code == "part-unsupported"


def test_the_weights_of_another_model_are_refused():
    adapter = full(tiny_model())
    with expect_error("checkpoint-corrupt"):
        adapter.load_state({"other": torch.zeros(1)})


def test_a_metrics_file_cut_short_by_a_kill_is_read_up_to_its_last_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_the_smoothed_line_of_a_constant_is_that_constant_from_its_first_point():
    assert averaged((3.0,) * 5, 0.9) == pytest.approx([3.0] * 5)
    assert averaged((1.0, 2.0), 0.0) == [1.0, 2.0]


@pytest.mark.parametrize("length", [1, 100])
def test_the_plot_is_a_picture_of_some_size(tmp_path, length):
    points = {"loss": [(i, 1 / (i + 1)) for i in range(length)], "eval_loss": [(length, 0.5)]}
    draw_picture(points, tmp_path / "loss.png", title="a run")
    import matplotlib.image

    picture = matplotlib.image.imread(tmp_path / "loss.png")
    assert picture.shape[0] > 300
    assert len({tuple(p) for p in picture.reshape(-1, picture.shape[-1])[::97].tolist()}) > 3


def test_an_evaluation_that_is_no_number_is_no_improvement_and_hides_none():
    asked = []
    run = SimpleNamespace(request_stop=asked.append)
    stopper = Stopper(EarlyStopping(patience=2))
    for step, value in enumerate([float("nan"), 3.0, float("nan"), 2.0, float("nan"), float("nan")]):
        assert asked == []
        stopper.evaluated(run, step, {"eval_loss": value})
    assert asked == ["eval_loss has not improved on 2 in 2 evaluations"]
