"""Other architectures, dtypes and tied embeddings; and what attaching refuses."""

import copy
import random
import tempfile

import pytest
import torch
from luthier import LuthierError
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model
from luthier_peft.adapter import build
from luthier_peft.options import options_class
from transformers import AutoModelForCausalLM

from .conftest import IDS, World, context_of, distance, fitting, outputs

CONV1D = ("lora", "adalora", "vera", "waveft", "hira")  # methods that take transformers' transposed layers


def reloaded(model):
    """The outputs that plain transformers gives with a saved model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return outputs(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("method", CONV1D)
@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_gpt2_trains_and_merges_through_its_transposed_layers(method):
    world = World(fitting(method, target_modules=["c_attn", "attn.c_proj"]), architecture="gpt2")
    world.train(4, rate=1e-2)
    trained = world.outputs()
    assert distance(trained, outputs(world.base)) > 1e-3
    with world.part.disabled():
        assert world.outputs().equal(outputs(world.base))
    assert distance(reloaded(world.part.merge(world.context)), trained) < 1e-5


@pytest.mark.parametrize("method", ["lora", "oft", "ia3"])
def test_mixtral_trains_and_merges(method):
    targets = ["k_proj", "v_proj"]
    changes = {"feedforward_modules": []} if method == "ia3" else {}
    world = World(fitting(method, target_modules=targets, **changes), architecture="mixtral")
    world.train(4, rate=1e-2)
    trained = world.outputs()
    assert distance(trained, outputs(world.base)) > 1e-3
    assert distance(reloaded(world.part.merge(world.context)), trained) < 1e-5


def test_experts_train_through_target_parameters(tmp_path):
    options = fitting("lora", target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    world, fresh = World(options, architecture="mixtral"), World(options, architecture="mixtral", seed=1)
    world.train(4, rate=1e-2)
    trained = world.outputs()
    assert distance(trained, outputs(world.base)) > 1e-3
    with world.part.disabled():
        assert world.outputs().equal(outputs(world.base))
    world.part.save(tmp_path)
    fresh.part.load(tmp_path)
    assert distance(fresh.outputs(), trained) < 1e-6
    assert distance(reloaded(world.part.merge(world.context)), trained) < 1e-5


def test_beft_merges_where_every_layer_has_a_bias():
    world = World(fitting("beft"), architecture="qwen2")
    world.train(3, rate=1e-2)
    trained = world.outputs()
    assert distance(reloaded(world.part.merge(world.context)), trained) < 1e-5


def test_trainable_tokens_reach_a_tied_head():
    options = fitting("trainable_tokens")
    world = World(options, tie_word_embeddings=True)
    (group,) = world.part.groups()
    assert group.role == "embedding" and group.weight_decay == 0.0
    world.train(4, rate=1e-2)
    trained = world.outputs()
    with world.part.disabled():
        assert world.outputs().equal(outputs(world.base))
    merged = world.part.merge(world.context)
    assert distance(outputs(merged), trained) < 1e-5
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("method, target", [("lora", "lm_head"), ("oft", "lm_head"), ("osf", "lm_head"),
                                            ("lora", "embed_tokens"), ("oft", "embed_tokens")])  # fmt: skip
def test_merging_an_adapted_layer_leaves_the_one_it_was_tied_to(method, target):
    world = World(fitting(method, target_modules=[target, "v_proj"]), tie_word_embeddings=True)
    world.train(4, rate=1e-2)
    trained = world.outputs()
    merged = world.part.merge(world.context)
    assert merged.config.tie_word_embeddings is False
    assert distance(outputs(merged), trained) < 1e-5 and distance(reloaded(merged), trained) < 1e-5


def test_ensure_weight_tying_merges_into_both():
    options = fitting("lora", target_modules=["embed_tokens"], ensure_weight_tying=True)
    world = World(options, tie_word_embeddings=True)
    world.train(4, rate=1e-2)
    trained = world.outputs()
    assert distance(reloaded(world.part.merge(world.context)), trained) < 1e-5


def test_dora_of_peft_is_an_option_of_its_lora():
    world = World(fitting("lora", use_dora=True, use_rslora=True))
    assert distance(world.outputs(), outputs(world.base)) < 1e-5
    decays = {g.weight_decay: g.names for g in world.part.groups()}
    assert all("magnitude" in name for name in decays[0.0]) and len(decays[0.0]) == 4
    world.train(4, rate=1e-2)
    trained = world.outputs()
    assert distance(outputs(world.part.merge(world.context)), trained) < 1e-5


@pytest.mark.parametrize("method", ["lora", "vera", "boft", "randlora", "ln_tuning"])
def test_on_a_bfloat16_base_it_trains_in_float32_where_peft_does(method):
    model = tiny_model().to(torch.bfloat16)
    base = copy.deepcopy(model)
    part = build(fitting(method))
    part.attach(model, context_of(model))
    dtypes = {p.dtype for group in part.groups() for p in group.parameters}
    assert dtypes == {torch.bfloat16 if method == "ln_tuning" else torch.float32}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for group in part.groups() for p in group.parameters)
    with part.disabled():
        assert outputs(model).equal(outputs(base))


def test_the_runs_seed_decides_and_the_callers_generators_stay():
    torch.manual_seed(11)
    random.seed(11)
    before = torch.get_rng_state(), random.getstate()
    first, again, other = World(fitting("lora"), seed=4), World(fitting("lora"), seed=4), World(fitting("lora"), seed=5)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert all(a.equal(b) for a, b in zip(first.parameters, again.parameters))
    assert not all(a.equal(b) for a, b in zip(first.parameters, other.parameters))


def test_disabling_leaves_what_trains_and_may_be_nested():
    world = World(fitting("lora", modules_to_save=["lm_head"]))
    world.train(2)
    flags, trained = [p.requires_grad for p in world.model.parameters()], world.outputs()
    with world.part.disabled():
        with world.part.disabled():
            pass
        assert world.outputs().equal(outputs(world.base))
    assert [p.requires_grad for p in world.model.parameters()] == flags
    assert world.outputs().equal(trained)


def test_a_reference_may_be_computed_between_forward_and_backward():
    world, plain = World(fitting("lora")), World(fitting("lora"))
    loss = world.model(input_ids=IDS, labels=IDS).loss
    with world.part.disabled():
        world.outputs()
    loss.backward()
    plain.model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(a.grad.equal(b.grad) and b.grad is not None for a, b in zip(world.parameters, plain.parameters))


REFUSED = [
    ({"target_modules": ["q_porj", "v_proj"]}, "target_modules", ("adapter peft.lora.target_modules", "q_proj")),
    ({"target_modules": ["nothing_like_it"]}, "target_modules", ("adapter peft.lora.target_modules", "gate_proj")),
    ({"target_modules": r".*\.h\.\d+"}, "target_modules", ("adapter peft.lora.target_modules",)),
    ({"target_modules": "q_proj"}, "target_modules", ("[q_proj]",)),
    ({"target_modules": ["lm_head"]}, "target_modules", ("adapter peft.lora.target_modules", "lm_head")),
    ({"modules_to_save": ["lm_haed"]}, "modules_to_save", ("adapter peft.lora.modules_to_save", "lm_head")),
    ({"exclude_modules": ["k_porj"]}, "exclude_modules", ("adapter peft.lora.exclude_modules", "k_proj")),
    ({"target_parameters": ["experts.gate"]}, "target_parameters", ("adapter peft.lora.target_parameters",)),
    ({"rank_pattern": {"k_proj": 4}}, "adapter peft.lora", ("k_proj",)),
    ({"layers_to_transform": [7]}, "adapter peft.lora", ("layers_to_transform",)),
    ({"ensure_weight_tying": True}, "adapter peft.lora", ("adapter peft.lora",)),
]


@pytest.mark.parametrize("changes, where, said", REFUSED)
def test_a_name_that_matches_nothing_is_an_error_with_near_misses(changes, where, said):
    with pytest.raises(LuthierError) as caught:
        World(fitting("lora", **changes))
    assert all(fact in str(caught.value) for fact in said)
    assert caught.value.code == "model-target" and where in caught.value.where


@pytest.mark.parametrize("method", ["ln_tuning", "trainable_tokens"])
def test_a_method_that_trains_weights_of_the_model_takes_the_head_alone(method):
    assert World(fitting(method, target_modules=["lm_head"])).parameters


def test_a_bad_pattern_is_named():
    with expect_error("recipe-out-of-range", "adapter peft.lora.target_modules") as caught:
        World(fitting("lora", target_modules="q_proj("))
    assert caught.value.code == "recipe-out-of-range"


def test_without_a_default_of_pefts_the_layers_to_choose_from_are_listed():
    with expect_error("model-target", "adapter peft.lora.target_modules") as caught:
        World(options_class("lora")(), architecture="granite")
    assert caught.value.code == "model-target"
    assert World(options_class("lora")(target_modules="all-linear"), architecture="granite").parameters


def test_a_layer_that_the_method_does_not_know_is_refused():
    with expect_error("part-unsupported", "adapter peft.boft", "Conv1D") as caught:
        World(fitting("boft", target_modules=["c_attn"]), architecture="gpt2")
    assert caught.value.code == "part-unsupported"


def test_options_that_do_not_fit_the_layer_are_refused_in_pefts_words():
    with expect_error("recipe-out-of-range", "adapter peft.c3a") as caught:
        World(fitting("c3a", block_size=256))
    assert caught.value.code == "recipe-out-of-range"


def test_hra_is_refused_where_pefts_start_would_be_no_number():
    with expect_error("recipe-conflict", "adapter peft.hra.apply_GS", "init_weights"):
        World(fitting("hra", apply_GS=True))
    assert World(fitting("hra", apply_GS=True, init_weights=False)).outputs().isfinite().all()


def test_a_second_adapter_is_refused():
    world = World(fitting("lora"))
    with expect_error("part-unsupported", "adapter peft.loha") as caught:
        build(fitting("loha")).attach(world.model, world.context)
    assert caught.value.code == "part-unsupported"


def test_nothing_to_train_is_an_error():
    with pytest.raises(LuthierError) as caught:
        World(fitting("trainable_tokens", token_indices=[]))
    assert caught.value.code == "train-nothing"
