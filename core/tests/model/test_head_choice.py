"""Which way a policy takes through its head: by what trains, what the loss declares, and what the head is."""

import copy
import functools
import inspect

import pytest
import torch
import transformers
from luthier.builtin import Sft
from luthier.builtin.sft import SupervisedLoss
from luthier.errors import LuthierError
from luthier.model.attention import document_arguments, install_attention
from luthier.model.head import scorer
from luthier.model.head.recognise_head import linear_head
from luthier.model.head.tiles import Curve
from luthier.model.policy import ModelPolicy
from luthier.plugins.contracts.values import LossOutput
from luthier.step.module import Step
from luthier.testing.worlds import SHAPE, random_batch, tiny_model

OTHERS = {  # heads that the worlds have not: a logit scale that multiplies, and a bias
    "cohere": ("CohereConfig", {**SHAPE, "logit_scale": 0.25}),
    "phi": ("PhiConfig", SHAPE),
}
HEADS = ["llama", "gemma2", "granite", "cohere", "phi"]
BATCH = (12, 5, 9)


def made(name, **changes):
    """A float64 model with packed attention."""
    if name not in OTHERS:
        model = tiny_model(name, **changes)
    else:
        kind, settings = OTHERS[name]
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**{**settings, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    install_attention(model.double())
    return model


def freeze_head(model):
    model.get_output_embeddings().requires_grad_(False)
    return model


def own_logprobs(model, batch):
    """[T] by the model's own forward, all its logits at once. Packed attention is tested elsewhere, in its own right."""
    told = document_arguments(batch)
    logits = model(
        input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, **told
    ).logits
    logprobs, places = logits[0].log_softmax(-1), batch.supervised
    found = logprobs[batch.previous[places], batch.labels[places]]
    return torch.zeros(batch.num_tokens, dtype=found.dtype).index_copy(0, places, found)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def said(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if " head " in f" {line} "]


@pytest.fixture(autouse=True)
def aloud():
    from luthier import logs

    logs.set_up("debug")
    yield
    logs.set_up("warning")


class Dpo:
    """A loss over pairs of documents, which declares no coefficients: -log sigmoid of the difference of two sums."""

    data = "tokens"

    def terms(self, batch):
        return {"dpo": batch.num_documents / 2}

    def __call__(self, policy, batch):
        sums = batch.sum_by_document(policy.token_logprobs(batch))
        return LossOutput(sums={"dpo": -torch.nn.functional.logsigmoid(sums[0::2] - sums[1::2]).sum()})

    def plain(self, logprobs, batch):
        sums = batch.sum_by_document(logprobs)
        return -torch.nn.functional.logsigmoid(sums[0::2] - sums[1::2]).sum()


class WeightedSft(SupervisedLoss):
    def __init__(self):
        super().__init__(Sft())

    def plain(self, logprobs, batch):
        return -(logprobs * batch.token_weights).sum()


class Nothing:
    """The adapter that adds nothing."""

    def prepare(self, batch):
        return batch


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss", [WeightedSft(), Dpo()], ids=["sft", "dpo"])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_head_and_loss_has_the_gradients_of_the_models_own_forward(name, tied, loss, frozen):
    model = made(name, tie_word_embeddings=tied)
    if frozen:
        freeze_head(model)
    batch = random_batch((12, 5, 9, 8))
    batch.token_weights = torch.linspace(0.5, 2.0, batch.num_tokens)
    plain = copy.deepcopy(model)
    found = next(iter(Step(model, Nothing(), loss)(batch).sums.values()))
    (found / 7).backward()
    expected = loss.plain(own_logprobs(plain, batch), batch)
    (expected / 7).backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    mine, theirs = gradients(model), gradients(plain)
    assert mine.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(mine[key], gradient, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize(
    ("loss", "frozen", "form"),
    [
        (WeightedSft(), False, "gradient in forward"),
        (WeightedSft(), True, "one-pass"),
        (Dpo(), False, "recompute"),
        (Dpo(), True, "one-pass"),
    ],
)
def test_the_form_follows_from_what_trains_and_what_the_loss_declares_and_is_said_once(loss, frozen, form, capsys):
    model = made("llama")
    if frozen:
        freeze_head(model)
    step = Step(model, Nothing(), loss)
    for _ in range(2):
        step(random_batch((12, 5)))
    (line,) = said(capsys)
    assert f"form={form}" in line.replace("'", "") and "reason=" in line


def test_an_entropy_that_is_asked_for_is_differentiated_where_the_head_trains(capsys):
    class Entropic(WeightedSft):
        def __call__(self, policy, batch):
            logprobs, also = policy.token_logprobs(batch, want=("entropy",))
            return LossOutput(sums={"sft": -(logprobs * batch.token_weights).sum() - 0.1 * also["entropy"].sum()})

    model = made("llama")
    Step(model, Nothing(), Entropic())(random_batch((12, 5))).sums["sft"].backward()
    assert "recompute" in said(capsys)[0]


def test_coefficients_that_a_loss_declares_wrongly_stop_the_run():
    class Wrong(WeightedSft):
        def coefficients(self, batch):
            return super().coefficients(batch) * torch.arange(batch.num_tokens)

    with pytest.raises(LuthierError, match="coefficients"):
        Step(made("llama"), Nothing(), Wrong())(random_batch((12, 5))).sums["sft"].backward()


def test_a_loss_that_couples_the_batch_is_replayed_with_any_gradient():
    class Coupled(WeightedSft):
        couples = "batch"

        def scores(self, policy, batch):
            return batch.sum_by_document(policy.token_logprobs(batch)), {}

    model = made("llama")
    step = Step(model, Nothing(), Coupled())
    found, _, _ = step(random_batch((12, 5)), step.compute_scores)
    found.backward(torch.tensor([0.3, -2.0], dtype=torch.float64))  # which is no multiple of its coefficients
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize("supervised", [0, 1])
@pytest.mark.parametrize("loss", [WeightedSft(), Dpo()], ids=["sft", "dpo"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_micro_batch_with_one_label_or_none_has_a_gradient(supervised, loss, frozen):
    model = made("llama")
    if frozen:
        freeze_head(model)
    batch = random_batch((6, 4))
    batch.labels[: batch.num_tokens - supervised] = -100
    batch.labels[batch.num_tokens - supervised :] = batch.input_ids[batch.num_tokens - supervised :]
    total = next(iter(Step(model, Nothing(), loss)(batch).sums.values()))
    total.backward()
    grads = gradients(model)
    assert grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}  # as DDP needs it
    assert any(g.any() for g in grads.values()) == bool(supervised)


@pytest.mark.parametrize("name", HEADS)
def test_a_linear_head_is_recognised_by_its_numbers(name):
    model = made(name)
    policy = ModelPolicy(model)
    policy.token_logprobs(random_batch(BATCH))
    config = model.config
    curve = policy.scorer._curve
    assert curve.cap == getattr(config, "final_logit_softcapping", None)
    assert curve.scale == pytest.approx({"granite": 1 / 3.0, "cohere": 0.25}.get(name, 1.0))


def lora_on_head(model):
    import peft

    settings = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    return peft.inject_adapter_in_model(settings, model).double().requires_grad_(True)


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.7)
    return model


def patched(model):
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: own(x) + x.sum(-1, keepdim=True).tanh()
    return model


def wrapped_forward(model):
    """Its logits are made otherwise although the head is a plain layer."""
    own = model.forward

    @functools.wraps(own)
    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = output.logits + 0.3 * output.logits.sin()
        return output

    forward.__signature__ = inspect.signature(own)
    model.forward = forward
    return model


def beside(model):
    """A layer beside the head, which as yet adds nothing."""
    model.extra = torch.nn.Linear(4, 4).double()
    return model


@pytest.mark.parametrize(
    ("change", "word"),
    [(lora_on_head, "Linear"), (hooked, "hooked"), (patched, "hooked"), (wrapped_forward, "logits"), (beside, "extra")],
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk", [7, 10_000])
def test_any_other_head_is_called_as_the_model_calls_it(change, word, frozen, chunk, capsys, monkeypatch):
    monkeypatch.setattr(scorer, "CHUNK", chunk * SHAPE["vocab_size"])
    model = change(made("llama"))
    if frozen:
        model.lm_head.requires_grad_(False)
    plain = copy.deepcopy(model)
    if change in (patched, wrapped_forward):  # their closures know the first model alone
        plain = change(made("llama"))
        plain.lm_head.requires_grad_(not frozen)
    batch, loss = random_batch(BATCH), WeightedSft()
    found = Step(model, Nothing(), loss)(batch).sums["sft"]
    found.backward()
    expected = loss.plain(own_logprobs(plain, batch), batch)
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    mine, theirs = gradients(model), gradients(plain)
    assert mine.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(mine[key], gradient, rtol=1e-7, atol=1e-9, msg=key)
    (line,) = said(capsys)
    assert word in line and ("one-pass" if frozen else "recompute") in line


def test_the_adapter_on_a_head_learns():
    model = lora_on_head(made("llama"))
    model.lm_head.base_layer.requires_grad_(False)
    Step(model, Nothing(), WeightedSft())(random_batch(BATCH)).sums["sft"].backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def test_statistics_of_any_other_head_are_those_of_its_logits(capsys):
    model = hooked(made("llama"))
    policy, batch = ModelPolicy(model), random_batch(BATCH)
    logprobs, also = policy.token_logprobs(batch, want=("top1", "entropy"))
    logits = policy.map_logits(batch, lambda values, labels: values)[batch.supervised]
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(logprobs[batch.supervised], distribution.log_prob(batch.labels[batch.supervised]))
    torch.testing.assert_close(also["entropy"][batch.supervised], distribution.entropy())
    assert torch.equal(also["top1"][batch.supervised].bool(), logits.argmax(-1) == batch.labels[batch.supervised])
    (also["entropy"] * torch.arange(batch.num_tokens)).sum().backward()
    assert model.lm_head.weight.grad.any()
    assert "recompute" in said(capsys)[0]


def test_recognising_a_head_leaves_the_random_state_alone():
    model = made("llama")
    policy, batch = ModelPolicy(model), random_batch(BATCH)
    policy.hidden(batch, (-1,))
    torch.manual_seed(3)
    policy.token_logprobs(batch)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_under_autocast_products_are_bfloat16_and_statistics_float32(name, frozen):
    model = made(name).float()
    if frozen:
        freeze_head(model)
    batch, plain = random_batch(BATCH), copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = ModelPolicy(model).token_logprobs(batch)
    assert found.dtype == torch.float32
    found.sum().backward()
    expected = own_logprobs(plain.double(), batch)
    expected.sum().backward()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=0.03, atol=0.1)
    mine, theirs = gradients(model), gradients(plain)
    for key, gradient in theirs.items():
        assert (mine[key] - gradient).norm() <= 0.06 * gradient.norm() + 1e-6, key


def test_an_evaluation_takes_no_gradient(capsys):
    model = made("llama")
    with torch.no_grad():
        output = Step(model, Nothing(), WeightedSft())(random_batch(BATCH))
    assert not output.sums["sft"].requires_grad and not said(capsys)
    assert 0 <= float(output.metrics["accuracy"][0]) <= output.metrics["accuracy"][1]


@pytest.mark.parametrize(("flags", "dtype"), [({"avx512_bf16"}, torch.bfloat16), (set(), torch.float32)])
def test_a_head_in_bfloat16_is_computed_in_float32_where_the_processor_only_imitates_that(flags, dtype, processor):
    processor(*flags)
    assert linear_head(torch.nn.Linear(8, 32, dtype=torch.bfloat16), Curve()).dtype is dtype
