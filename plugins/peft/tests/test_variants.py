"""Options beside the defaults: with each, the file gives the outputs, disabling the base, and merging what was trained."""

import warnings

import pytest
from luthier.testing import expect_error

from .conftest import World, distance, fitting, outputs
from .test_files import plain

QUICK = {("lora", "use_dora"), ("oft", "coft"), ("vblora", "save_only_topk_weights"), ("lora", "lora_bias")}
VARIANTS = [
    ("adalora", {"lora_dropout": 0.2}),
    ("adalora", {"trainable_token_indices": [10, 11]}),
    ("boft", {"boft_block_size": 0, "boft_block_num": 4}),
    ("boft", {"boft_dropout": 0.3}),
    ("c3a", {"block_size_pattern": {"v_proj": 16}}),
    ("deft", {"decomposition_method": "qr"}),
    ("deft", {"para": True}),
    ("delora", {"rank_pattern": {"q_proj": 4}, "lambda_pattern": {"v_proj": 3}}),
    ("fourierft", {"n_frequency_pattern": {"q_proj": 20}}),
    ("frod", {"save_projection": False}),
    ("glora", {"config_A_B": "vector"}),
    ("glora", {"config_A_B": "constant", "config_C": "vector", "config_D_E": "vector"}),
    ("gralora", {"hybrid_r": 4}),
    ("hira", {"rank_pattern": {"q_proj": 3}}),
    ("hra", {"apply_GS": True, "init_weights": False}),
    ("ia3", {"feedforward_modules": []}),
    ("lily", {"stride_A": 2, "num_B": 3}),
    ("ln_tuning", {"modules_to_save": "lm_head"}),
    ("loha", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    ("lokr", {"decompose_both": True}),
    ("lokr", {"rank_dropout": 0.3, "rank_dropout_scale": True}),
    ("lora", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ("lora", {"layers_to_transform": [1]}),
    ("lora", {"lora_bias": True}),
    ("lora", {"target_modules": "all-linear"}),
    ("lora", {"trainable_token_indices": [10, 11, 12]}),
    ("lora", {"use_dora": True, "lora_dropout": 0.3}),
    ("lora", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    ("miss", {"init_weights": "bat"}),
    ("miss", {"init_weights": "mini", "mini_r": 2}),
    ("oft", {"block_share": True}),
    ("oft", {"coft": True}),
    ("oft", {"use_cayley_neumann": False, "module_dropout": 0.3}),
    ("osf", {"effective_rank": 0.25}),
    ("osf", {"rank_pattern": {"q_proj": 4}}),
    ("peanut", {"depth": 2, "act_fn": "gelu"}),
    ("psoft", {"ab_svd_init": "pissa_init", "psoft_mag_a": False}),
    ("psoft", {"psoft_svd": "lowrank", "use_cayley_neumann": True}),
    ("pvera", {"save_projection": False}),
    ("randlora", {"sparse": True}),
    ("randlora", {"save_projection": False}),
    ("road", {"variant": "road_2"}),
    ("road", {"variant": "road_4"}),
    ("shira", {"random_seed": 3}),
    ("supertuning", {"r": 2, "lora_alpha": 4.0}),
    ("supertuning", {"select_top": False, "save_precomputed_indices": False}),
    ("tinylora", {"init_weights": "uniform", "save_projection": False}),
    ("tinylora", {"weight_tying": 1.0}),
    ("unilora", {"save_indices": True}),
    ("vblora", {"save_only_topk_weights": True}),
    ("vera", {"save_projection": False, "vera_dropout": 0.3}),
    ("waveft", {"use_idwt": False}),
    ("waveft", {"wavelet_family": "db2", "proportional_parameters": True}),
]
BIASED = "adalora boft c3a deft delora fourierft frod glora gralora hra lora miss oft pvera randlora tinylora unilora vblora vera waveft"
WITH_BIASES = [(method, {"bias": "all"}) for method in BIASED.split()]
COPYING = "beft boft c3a deft frod gralora hira ia3 loha miss osf psoft road shira vera"
WITH_COPIES = [(method, {"modules_to_save": ["lm_head"]}) for method in COPYING.split()]


def cases():
    for method, changes in [*VARIANTS, *WITH_BIASES, *WITH_COPIES]:
        quick = any((method, name) in QUICK for name in changes)
        marks = () if quick else pytest.mark.slow
        yield pytest.param(method, changes, marks=marks, id=f"{method}-{'-'.join(changes)}")


@pytest.mark.parametrize("method, changes", list(cases()))
def test_with_other_options_everything_holds_as_well(method, changes, tmp_path):
    architecture = "qwen2" if changes.keys() & {"bias", "lora_bias"} or method == "beft" else "llama"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world, fresh = (World(fitting(method, **changes), architecture=architecture, seed=s) for s in (0, 3))
    world.train(4)
    trained = world.outputs()
    with world.part.disabled():
        assert world.outputs().equal(outputs(world.base))
    world.part.save(tmp_path)
    assert distance(plain(world.base, tmp_path), trained) < 2e-6
    fresh.part.load(tmp_path)
    assert distance(fresh.outputs(), trained) < 2e-6
    fresh.part.load_state(world.part.state())
    assert fresh.outputs().equal(trained)
    if method == "lily":
        return
    assert distance(outputs(world.part.merge(world.context)), trained) < 1e-5


def test_biases_of_lora_have_nowhere_to_go_in_layers_without_one():
    world = World(fitting("lora", lora_bias=True))
    trained = world.outputs()
    with expect_error("artifact-unmergeable", "adapter peft.lora") as caught:
        world.part.merge(world.context)
    assert caught.value.code == "artifact-unmergeable" and "q_proj" in caught.value.found
    assert world.outputs().equal(trained)


@pytest.mark.parametrize("method", ["deft", "psoft", "oft", "adalora"])
def test_what_is_cached_for_evaluation_does_not_outlive_a_load(method, tmp_path):
    world, other = World(fitting(method)), World(fitting(method))
    other.train(5, rate=2e-2)
    wanted = other.outputs()
    world.train(2)
    world.outputs()
    world.part.load_state(other.part.state())
    assert world.outputs().equal(wanted)
    world.train(1)
    world.outputs()
    other.part.save(tmp_path)
    world.part.load(tmp_path)
    assert distance(world.outputs(), wanted) < 1e-6
