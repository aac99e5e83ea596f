"""Operations in models: recognised by what a module computes, the same numbers with them, and nothing left behind."""

import copy
import functools

import pytest
import torch
from luthier.model import attention
from luthier.model.operations.install_operations import install, installed_operations, ordinary_operations
from luthier.model.operations.recognise_layers import find_attention, find_block
from luthier.model.operations.recognise_operations import find_mlp, find_norm
from luthier.model.policy import ModelPolicy
from luthier.testing.worlds import ARCHITECTURES, random_batch, tiny_model
from operation_models import EXPECTED, LENGTHS, LLAMA, assert_same, counts, packed_model, step
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_loss_and_gradients_are_those_of_the_models_own_forward(architecture, dtype, bound):
    model = packed_model(architecture, dtype)
    theirs = step(model)
    with installed_operations(model, ordinary_operations()) as installed:
        assert counts(installed) == EXPECTED[architecture]
        assert_same(step(model), theirs, bound)


def test_under_autocast_they_agree_as_far_as_it_rounds():
    model = packed_model()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(model)
        with installed_operations(model, ordinary_operations()):
            mine = step(model)
    torch.testing.assert_close(mine[0], theirs[0], rtol=0.05, atol=0.05)


def test_what_products_are_given_under_autocast_is_cast_once_for_all_of_them():
    model, seen = packed_model(), []
    first = model.model.layers[0]
    layers = [first.self_attn.q_proj, first.self_attn.k_proj, first.self_attn.v_proj]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16), installed_operations(model, ordinary_operations()):
        step(model)
    assert {x.dtype for x in seen} == {torch.bfloat16}
    assert len({x.data_ptr() for x in seen}) == 1


def test_afterwards_the_model_is_as_it_was():
    model = packed_model()
    before, names = model.state_dict(), set(model.state_dict())
    with installed_operations(model, ordinary_operations()):
        assert set(model.state_dict()) == names
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_forward_that_somebody_put_around_ours_is_not_taken_away():
    model = packed_model()
    installed, layer = install(model, ordinary_operations()), model.model.layers[0]
    inner = layer.forward
    layer.forward = outer = functools.partial(inner)
    installed.remove()
    assert layer.forward is outer


def test_a_module_with_a_forward_of_its_own_is_left_alone():
    model = packed_model()
    norm = model.model.norm
    norm.forward = lambda x: x
    installed = install(model, ordinary_operations())
    assert counts(installed)["norm"] == 4
    installed.remove()
    assert norm.forward(3) == 3


def test_a_copy_of_the_model_computes_with_its_own_weights():
    model = packed_model()
    with installed_operations(model, ordinary_operations()):
        theirs = step(model)[0]
        twin = copy.deepcopy(model)
        with torch.no_grad():
            model.model.layers[0].mlp.gate_proj.weight.zero_()
            model.model.norm.weight.zero_()
        torch.testing.assert_close(step(twin)[0], theirs, rtol=0, atol=0)


def test_generation_with_a_cache_is_the_models_own():
    model = packed_model().eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    with attention.generating_attention(model):
        theirs = model.generate(ids, **told)
        with installed_operations(model, ordinary_operations()):
            assert torch.equal(model.generate(ids, **told), theirs)


def test_hidden_states_and_hooks_of_others_see_what_they_saw():
    model = packed_model()
    norm, seen = model.model.layers[0].post_attention_layernorm, []
    norm.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    batch = random_batch(LENGTHS)
    theirs = [x.detach() for x in ModelPolicy(model).hidden(batch, [0, 1, 2])]
    with installed_operations(model, ordinary_operations()):
        mine = ModelPolicy(model).hidden(batch, [0, 1, 2])  # a policy keeps the pass over a batch for later questions
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close([x.detach() for x in mine], theirs, rtol=1e-5, atol=1e-5)


def test_transformers_own_checkpointing_goes_on():
    model = packed_model()
    theirs = step(model)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    runs = []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with installed_operations(model, ordinary_operations()):
        assert_same(step(model), theirs, 1e-5)
    assert len(runs) == 2  # in forward, and again in backward


@pytest.mark.parametrize("mode", [True, "selective"])
def test_recomputation_gives_the_same_gradients(mode):
    from luthier.model import recompute

    model = packed_model()
    with installed_operations(model, ordinary_operations()):
        theirs = step(model)
        with recompute.install_recompute(model, mode):
            assert_same(step(model), theirs, 0.0)


def test_adapters_of_peft_stay_where_they_are():
    from peft import LoraConfig, inject_adapter_in_model

    model = packed_model()
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), model)
    theirs = step(model)
    with installed_operations(model, ordinary_operations()) as installed:
        assert counts(installed) == LLAMA
        assert_same(step(model), theirs, 1e-5)
    assert any("lora_A" in name for name in theirs[1])


def test_without_weights_structure_alone_decides():
    config = tiny_model().config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert counts(install(model, ordinary_operations(), verified=False)) == LLAMA


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_module_computes_is_known_before_it_has_weights(architecture):
    model = packed_model(architecture)
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(model.config)
    attention.install_attention(hollow)
    for (name, mine), theirs in zip(model.named_modules(), hollow.modules(), strict=True):
        for find in (find_norm, find_mlp, find_attention, find_block):
            assert find(theirs) == find(mine), (name, find.__name__)


def test_a_token_costs_what_its_rows_are_wide():
    installed = install(packed_model("qwen3"), ordinary_operations())
    heads = 4 * 8 + 2 * 8
    assert installed.widths == {"norm": 5 * 32 + 4 * 8 + 2 * heads, "rope": 2 * heads, "silu": 2 * 48}


# in a run


def test_a_run_computes_by_operations_and_gives_the_model_back(train, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    run = train(model=model, tokenizer=_tokenizer(model_folder), max_steps=1)
    lines = (run.output_path / "log.jsonl").read_text()
    assert '"operation"' in lines or run.steps == 1
    assert not any("forward" in vars(module) for module in model.modules())


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
