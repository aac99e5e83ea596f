"""Dropout rates are found wherever a model keeps them, set together, and put back; the config stays as it is."""

import pytest
import torch
import transformers
from luthier.model.dropout import check_dropout, dropping, find_rates, set_rates
from luthier.testing import expect_error
from luthier.testing.worlds import ARCHITECTURES, SHAPE, tiny_model

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 32}),
    "falcon": ("FalconConfig", SIZES),
    "persimmon": ("PersimmonConfig", {**SIZES, "intermediate_size": 32}),
    "starcoder2": ("Starcoder2Config", SHAPE),
    "mpt": ("MptConfig", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "gpt_neo": ("GPTNeoConfig", {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                                 "attention_types": [[["global", "local"], 1]]}),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])


def made(name):
    """A model whose every weight matters, in training mode."""
    if name in ARCHITECTURES:
        return tiny_model(name)
    torch.manual_seed(0)
    config, sizes = OTHERS[name]
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes)).train()


def two_passes(model):
    """Whether two passes in training mode differ, and whether the first is that of evaluation."""
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        one, two = (model.train()(tokens).logits for _ in range(2))
        still = model.eval()(tokens).logits
    return not torch.equal(one, two), torch.allclose(one, still, rtol=1e-4, atol=1e-5)


@every_model
def test_a_rate_makes_passes_differ_and_zero_makes_them_those_of_evaluation(name):
    model = made(name)
    set_rates(model, 0.5)
    assert two_passes(model) == (True, False)
    set_rates(model, 0.0)
    assert two_passes(model) == (False, True)


@every_model
def test_rates_are_those_that_came_after_the_context(name):
    model = made(name)
    came = [(id(rate.holder), rate.name, rate.value) for rate in find_rates(model)]
    with dropping(model, 0.25):
        assert {rate.value for rate in find_rates(model)} == {0.25}
    assert [(id(rate.holder), rate.name, rate.value) for rate in find_rates(model)] == came


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "mpt"])
def test_a_config_that_modules_have_copied_stays_as_it_is(name):
    model = made(name)
    before = model.config.to_dict()
    set_rates(model, 0.5)
    assert model.config.to_dict() == before


def test_a_model_without_dropout_refuses_a_rate():
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    check_dropout(model, None)
    with expect_error("recipe-conflict", "model.dropout"):
        check_dropout(model, 0.0)
