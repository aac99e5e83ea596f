"""Virtual tokens and prefixes: packed and along continuations they are what a plain model computes with them."""

import contextlib

import attrs
import luthier
import pytest
import torch
from exact_models import exact_model, stand_in_kernel
from luthier.data.batches.batch import chain_of, continue_documents
from luthier.errors import LuthierError
from luthier.model import attention
from luthier.model import self_check as probe
from luthier.model.attention import varlen, ways
from luthier.model.generation.generate import Sampling, generate_text
from luthier.model.generation.generation_inputs import compute_logits, prepare_generation
from luthier.model.policy import ModelPolicy
from luthier.testing import expect_error
from luthier.testing.exactness import unrounded
from luthier.testing.worlds import random_batch, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

LENGTHS, LINKS = (7, 4, 6, 3, 9, 5), (-1, 0, 0, 1, -1, 0)
MANY = ["llama", "qwen2_sliding", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3", "opt", "mixtral",
        "qwen3_moe", "olmo3", "cohere2", "glm4"]  # fmt: skip


class Table(luthier.Adapter):
    """A trained table on the model."""

    def __init__(self, model, rows=3):
        self.model, self.rows, text = model, rows, model.config.get_text_config()
        self.layers = text.num_hidden_layers
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self.heads = text.num_attention_heads if text.model_type in ("opt", "gpt_neox") else heads
        shape = self.shape(size, text.hidden_size)
        random = torch.Generator().manual_seed(5)
        self.weight = torch.nn.Parameter(torch.randn(shape, generator=random).to(model.dtype))

    def attach(self, model, context):
        return model

    def groups(self):
        return [luthier.Group(parameters=[self.weight], names=["weight"])]

    def state(self):
        return {"weight": self.weight.detach()}

    def load_state(self, state):
        with torch.no_grad():
            self.weight.copy_(state["weight"])

    def save(self, folder):
        save_file(self.state(), folder / "table.safetensors")

    def load(self, folder):
        self.load_state(load_file(folder / "table.safetensors"))

    def disabled(self):
        return contextlib.nullcontext()


class Virtual(Table):
    def shape(self, size, width):
        return (self.rows, width)

    def virtual_tokens(self):
        return self.rows

    def prepare(self, batch):
        prepared = batch.insert_virtual(self.rows)
        known = self.model.get_input_embeddings()(prepared.input_ids)
        places = (prepared.origin < 0).nonzero().squeeze(1)
        prompts = self.weight.repeat(len(places) // self.rows, 1)
        return attrs.evolve(prepared, embeddings=known.index_copy(0, places, prompts))


class Prefixed(Table):
    def shape(self, size, width):
        return (self.layers, 2, self.rows, self.heads, size)

    def prefixes(self, layer):
        return self.weight[layer, 0], self.weight[layer, 1]


def shared_batch(lengths=LENGTHS, links=LINKS):
    batch = random_batch(lengths, supervised=1.0)
    return continue_documents(attrs.evolve(batch, labels=batch.input_ids), links)


def plain(model, adapter, batch):
    """[T] by the model's plain forward over each document alone, the prompt as in generation."""
    pieces, found = batch.input_ids.split(batch.lengths.tolist()), []
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    for document, own in enumerate(pieces):
        ids = torch.cat([pieces[d] for d in chain_of(LINKS, document)])
        logprobs = compute_logits(model, ids, adapter)[:-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
        found.append(torch.cat([logprobs.new_zeros(1), logprobs])[-len(own) :])
    model.set_attn_implementation(before)
    return torch.cat(found)


def differentiated(adapter, compute):
    found = compute()
    weights = torch.rand(len(found), dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    return found.detach(), torch.autograd.grad((found * weights).sum(), adapter.weight)[0]


@pytest.mark.parametrize("kind", [Virtual, Prefixed])
@pytest.mark.parametrize("name", MANY)
def test_prompts_equal_a_plain_model_on_separate_documents_in_values_and_gradients(name, kind):
    model, batch = exact_model(name), shared_batch()
    adapter = kind(model)
    with unrounded():
        found, gradient = differentiated(adapter, lambda: ModelPolicy(model, adapter).token_logprobs(batch))
        expected, theirs = differentiated(adapter, lambda: plain(model, adapter, batch))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, theirs, rtol=1e-10, atol=1e-10)
    without = ModelPolicy(model).token_logprobs(batch)
    assert not torch.allclose(found, without, atol=1e-2)


@pytest.mark.parametrize("kernel", ["at once", "singly"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_kernel_for_gpus_is_given_prefixes_and_shared_prompts(name, kernel):
    model, batch = exact_model(name), shared_batch()
    adapter = Prefixed(model)
    expected, theirs = differentiated(adapter, lambda: ModelPolicy(model, adapter).token_logprobs(batch))
    calls = []

    def counted(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
                window_size=(-1, -1)):  # fmt: skip
        calls.append(len(k))
        told = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
        return stand_in_kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **told)

    offered = varlen.Kernel.of(counted) if kernel == "at once" else None
    kernels = varlen.Kernels(torch=offered, find_obstacle=lambda query, value: None)
    ways.set_attention(model, ways.Choice(ways.TORCH, kernels))
    found, gradient = differentiated(adapter, lambda: ModelPolicy(model, adapter).token_logprobs(batch))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, theirs, rtol=1e-10, atol=1e-10)
    known = [sum(LENGTHS[d] for d in chain_of(LINKS, document)) + 3 for document in range(len(LENGTHS))]
    assert calls == ([sum(known)] * 2 if kernel == "at once" else [])


@pytest.mark.parametrize("kind", [Virtual, Prefixed])
def test_a_prompt_is_recomputed_in_backward(kind):
    from luthier.model import recompute

    model, batch = exact_model("llama").train(), shared_batch()
    adapter = kind(model)
    expected = differentiated(adapter, lambda: ModelPolicy(model, adapter).token_logprobs(batch))
    with recompute.install_recompute(model, True):
        found = differentiated(adapter, lambda: ModelPolicy(model, adapter).token_logprobs(batch))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Virtual, Prefixed])
def test_all_that_the_policy_gives_is_at_the_losss_tokens_and_a_policy_without_the_adapter_has_no_prompt(kind):
    model, batch = exact_model("mixtral"), shared_batch()
    adapter = kind(model)
    policy = ModelPolicy(model, adapter)
    policy.want_routers = True
    assert len(policy.states(batch)) == batch.num_tokens
    assert [len(h) for h in policy.hidden(batch, (0, 1, -1))] == [batch.num_tokens] * 3
    assert [len(r) for r in policy.router_logits(batch)] == [batch.num_tokens] * 2
    base = ModelPolicy(model)
    torch.testing.assert_close(
        ModelPolicy(model, frozen=adapter.disabled).token_logprobs(batch), base.token_logprobs(batch).detach()
    )
    assert not torch.allclose(policy.token_logprobs(batch), base.token_logprobs(batch))


def test_virtual_tokens_stand_before_each_document_that_continues_none():
    batch = shared_batch((3, 2, 1, 2), (-1, 0, -1, 0))
    prepared = batch.insert_virtual(2)
    assert prepared.origin.tolist() == [-1, -1, 0, 1, 2, 3, 4, -1, -1, 5, 6, 7]
    assert prepared.document_starts.tolist() == [0, 5, 7, 10, 12]
    assert prepared.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 5, 6]
    assert prepared.previous.tolist() == [-1, -1, -1, 2, 3, 4, 5, -1, -1, -1, 4, 10]
    own = prepared.origin >= 0
    assert prepared.labels[own].tolist() == batch.labels.tolist() and (prepared.labels[~own] == -100).all()
    assert prepared.token_weights[own].equal(batch.token_weights)


@pytest.mark.parametrize("kind", [Virtual, Prefixed])
def test_the_probe_compares_prompts_with_what_generation_is_given(kind):
    model = exact_model("llama")
    adapter = kind(model)
    assert probe.find_disagreement(model, adapter=adapter) is None
    adapter.generating = lambda inputs: {**inputs, "use_cache": False}  # it says that nothing else is needed
    assert "differ from the model's own forward" in probe.find_disagreement(model, adapter=adapter)


BROKEN = {
    "no origin": lambda a, b: attrs.evolve(b.insert_virtual(a.rows), origin=None),
    "a token lost": lambda a, b: attrs.evolve(b.insert_virtual(a.rows), origin=b.insert_virtual(a.rows).origin - 1),
    "another number": lambda a, b: b.insert_virtual(a.rows + 1),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_prepared_batch_that_does_not_keep_the_contract_is_refused(broken):
    model = exact_model("llama")
    adapter = Virtual(model)
    adapter.prepare = lambda batch: BROKEN[broken](adapter, batch)
    with pytest.raises(LuthierError) as caught:
        ModelPolicy(model, adapter).token_logprobs(shared_batch())
    assert caught.value.code == "part-invalid"


def test_prefixes_of_another_shape_or_in_some_layers_alone_are_refused():
    model = exact_model("llama")
    adapter = Prefixed(model)
    own = adapter.prefixes
    adapter.prefixes = lambda layer: own(layer) if layer else None
    with expect_error("part-invalid", "adapter"):
        ModelPolicy(model, adapter).token_logprobs(shared_batch())
    adapter.prefixes = lambda layer: (own(layer)[0][:, :1], own(layer)[1])
    with expect_error("part-invalid", "adapter"):
        ModelPolicy(model, adapter).token_logprobs(shared_batch())


def test_an_architecture_that_takes_no_prefixes_is_refused():
    model = exact_model("bloom")
    assert "takes no prefixes" in probe.find_disagreement(model, adapter=Prefixed(model), packing=False)
    assert probe.find_disagreement(model, adapter=Virtual(model), packing=False) is None


@pytest.mark.parametrize("kind", [Virtual, Prefixed])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_generation_goes_on_after_the_prompt_as_the_policy_would(name, kind):
    model = tiny_model(name) if name != "gemma3" else exact_model(name)
    attention.install_attention(model.eval())
    adapter, ids = kind(model), torch.tensor([5, 6, 7, 9])
    for _ in range(5):
        batch = random_batch((len(ids),))
        batch.input_ids = batch.labels = ids
        following = ModelPolicy(model, adapter).head(ModelPolicy(model, adapter).states(batch)[-1:]).argmax(-1)
        ids = torch.cat([ids, following])
    with attention.generating_attention(model):
        inputs = prepare_generation(model, adapter, ids[None, :4])
        found = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found[0, -5:].tolist() == ids[4:].tolist()


@pytest.mark.parametrize("kind", [Virtual, Prefixed])
def test_an_answer_is_given_with_the_prompt_on(kind):
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    attention.install_attention(model)
    adapter = kind(model)
    without = generate_text(model, tokenizer, "1 and 2?", sampling=Sampling(max_new_tokens=8))
    found = generate_text(model, tokenizer, "1 and 2?", adapter=adapter, sampling=Sampling(max_new_tokens=8))
    assert found != without
