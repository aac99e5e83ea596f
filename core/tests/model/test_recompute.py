"""Recomputation: the gradients of a plain pass to the bit, dropout included, and less kept in between."""

import contextlib
from collections import Counter

import luthier
import pytest
import torch
from luthier.builtin import Sft
from luthier.builtin.full import FullTuning
from luthier.builtin.sft import SupervisedLoss
from luthier.errors import LuthierError
from luthier.model import attention, recompute
from luthier.model.recompute.offload import HostMemory
from luthier.model.recompute.selective import selective_contexts
from luthier.model.weights.layers import decoder_layers
from luthier.plugins.records import NoOptions
from luthier.step.module import Step
from luthier.testing.contexts import context
from luthier.testing.worlds import random_batch, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

WIDE = {"hidden_size": 64, "intermediate_size": 96}  # products of fewer terms are made again, not kept
WORLDS = {
    "llama": WIDE,
    "gemma2": WIDE,
    "mixtral": WIDE,
    "gpt2": {"n_embd": 64, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0},
}
DROPPING = {"llama": {**WIDE, "attention_dropout": 0.1}, "gpt2": {**WORLDS["gpt2"], "attn_pdrop": 0.1}}


def adapted(architecture, method, **changes):
    model = tiny_model(architecture, **changes)
    attention.install_attention(model)
    if method == "full":
        adapter = FullTuning(NoOptions())
    else:
        from luthier_lora import Lora
        from luthier_lora.adapter import LoraAdapter

        adapter = LoraAdapter(Lora(r=4, lora_dropout=0.2, target_modules="all-linear", init_lora_weights=False))
    model = adapter.attach(model, context(model)).train()
    return model, adapter


def differentiated(architecture, method, mode, *, low=False, **changes):
    """Loss, gradients, and the bytes that autograd holds between forward and backward, one layer's input each."""
    model, adapter = adapted(architecture, method, **changes)

    def computing():
        return torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext()

    step, held = Step(model, adapter, SupervisedLoss(Sft()), computing=computing), {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with recompute.install_recompute(model, mode):
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = sum(step(random_batch((9, 5))).sums.values())
        size = sum(held.values())
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize("mode", [True, "selective"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("architecture", "changes"), [*WORLDS.items(), *DROPPING.items()])
def test_loss_and_gradients_are_those_of_a_plain_pass_to_the_bit(architecture, changes, method, mode):
    loss, gradients, size = differentiated(architecture, method, False, **changes)
    again, found, smaller = differentiated(architecture, method, mode, **changes)
    assert torch.equal(loss, again)
    assert gradients.keys() == found.keys()
    assert all(torch.equal(gradients[name], found[name]) for name in gradients)
    assert smaller < 0.5 * size


@pytest.mark.parametrize("mode", [True, "selective"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_same_under_autocast(method, mode):
    loss, gradients, _ = differentiated("llama", method, False, low=True, **WIDE)
    again, found, _ = differentiated("llama", method, mode, low=True, **WIDE)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], found[name]) for name in gradients)


class Counting(TorchDispatchMode):
    """How often each operation is really run."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(mode):
    """Products and elementwise operations of one backward through a block of products and activations."""
    layer = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64), nn.Tanh())
    x = torch.randn(8, 64, requires_grad=True)
    how = {"context_fn": selective_contexts} if mode == "selective" else {}
    out = checkpoint(layer, x, use_reentrant=False, **how) if mode else layer(x)
    with Counting() as seen:
        out.sum().backward()
    return seen.calls["addmm"], seen.calls["silu"]


def test_whole_layers_are_made_again_and_selective_ones_without_their_products():
    assert counted(False) == (0, 0)
    assert counted(True) == (2, 1)
    assert counted("selective") == (0, 1)


class Changed(torch.autograd.Function):
    """A product that something is accumulated into, as a low-rank update is."""

    @staticmethod
    def forward(ctx, x, weight, read_first):
        result = x @ weight
        seen = result * 2 if read_first else None
        result.add_(x.mul(3.0))
        ctx.save_for_backward(x, weight, result if seen is None else seen)
        return result

    @staticmethod
    def backward(ctx, grad):
        x, weight, kept = ctx.saved_tensors
        return grad @ weight.T + 3 * grad + kept, x.T @ grad, None


@pytest.mark.parametrize("read_first", [False, True])
def test_a_product_that_is_changed_in_place_is_right_all_the_same(read_first):
    """Torch's own selective contexts refuse it, or would add twice."""

    def gradient(how):
        torch.manual_seed(0)
        x, weight = torch.randn(4, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)

        def layer(x):
            return torch.sigmoid(Changed.apply(x, weight, read_first)).sin()

        out = layer(x) if how is None else checkpoint(layer, x, use_reentrant=False, context_fn=how)
        out.sum().backward()
        return x.grad, weight.grad

    assert all(torch.equal(a, b) for a, b in zip(gradient(None), gradient(selective_contexts), strict=True))


def test_a_product_that_is_changed_after_the_layer_is_made_again():
    def gradient(how):
        torch.manual_seed(0)
        x, weight = torch.randn(4, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)

        def layer(x):
            product = x @ weight
            return product, product.detach().sin() * x

        product, other = layer(x) if how is None else checkpoint(layer, x, use_reentrant=False, context_fn=how)
        with torch.no_grad():
            product.mul_(0.5)
        other.sum().backward()
        return x.grad

    assert torch.equal(gradient(None), gradient(selective_contexts))


def test_without_gradients_nothing_is_wrapped_around_a_layer():
    model, _ = adapted("llama", "full")
    ids = torch.arange(6)[None]
    with recompute.install_recompute(model, True), torch.no_grad(), attention.generating_attention(model):
        assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == 6


def test_every_forward_is_its_own_again_afterwards():
    model, _ = adapted("llama", "full")
    first, second = decoder_layers(model)
    own = first.forward = lambda *args, **kwargs: type(first).forward(first, *args, **kwargs)
    with recompute.install_recompute(model, True):
        assert first.forward is not own
    assert first.forward is own
    assert "forward" not in vars(second)


def test_a_model_without_layers_is_refused():
    with pytest.raises(LuthierError) as caught, recompute.install_recompute(nn.Linear(2, 2), True):
        pass
    assert (caught.value.code, caught.value.where) == ("part-unsupported", "gradient_checkpointing")


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_offloading_where_the_host_is_the_device_is_refused(train, tmp_path, device):
    with pytest.raises(LuthierError) as caught:
        recompute.refuse_recompute("offload", torch.device(device))
    assert caught.value.code == "recipe-conflict"
    with pytest.raises(LuthierError):
        train(gradient_checkpointing="offload")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", [True, "selective"])
def test_a_run_takes_the_same_steps(train, tmp_path, mode):
    shared = {"adapter": {"name": "lora", "r": 4, "lora_dropout": 0.1}, "max_steps": 3}
    plain = train(**shared, output_dir=tmp_path / "plain")
    again = train(**shared, output_dir=tmp_path / "again", gradient_checkpointing=mode)
    assert again.loss_history == plain.loss_history
    assert not any("forward" in vars(module) for module in again.model.modules())


def test_the_plan_predicts_less_memory(model_folder, rows):
    def activations(mode):
        found = luthier.plan(model=str(model_folder), data=rows, gradient_checkpointing=mode, global_batch_size=24)
        return found.memory["activations"]

    assert activations(True) < 0.7 * activations(False)


class Straight:
    """A way on which everything is there at once, for a device that is its own host."""

    def __init__(self):
        self.made, self.log = 0, []

    def buffer(self, tensor):
        self.made += 1
        return torch.empty_like(tensor)

    def send(self, tensor, buffer):
        self.log.append("send")
        buffer.copy_(tensor)

    def fetch(self, buffer, device, sent):
        self.log.append("fetch")
        return buffer.to(device, copy=True), None

    def arrive(self, tensor, fetched):
        self.log.append("arrive")


def offloaded(host, weights, x):
    for number, weight in enumerate(weights):
        with host.saving(number):
            x = checkpoint(lambda x, w=weight: torch.sigmoid(x @ w), x, use_reentrant=False)
    return x.sum()


def test_what_went_to_the_host_comes_back_a_layer_ahead_and_its_room_is_used_again():
    weights = [torch.randn(6, 6, requires_grad=True) for _ in range(4)]
    x, way = torch.randn(5, 6), Straight()
    host = HostMemory(resident=3, way=way, smallest=0)
    for _ in range(3):
        gradients = torch.autograd.grad(offloaded(host, weights, x), weights)
        assert way.log == [*["send"] * 3, "fetch", "fetch", "arrive", "fetch", "arrive", "arrive"]
        way.log.clear()
    assert way.made == 3
    plain = x
    for weight in weights:
        plain = torch.sigmoid(plain @ weight)
    assert all(torch.equal(a, b) for a, b in zip(gradients, torch.autograd.grad(plain.sum(), weights), strict=True))


def test_a_pass_that_is_never_differentiated_leaves_nothing_behind():
    weights, way = [torch.randn(6, 6, requires_grad=True) for _ in range(3)], Straight()
    host = HostMemory(resident=2, way=way, smallest=0)
    offloaded(host, weights, torch.randn(5, 6))  # memory ran out, say
    way.log.clear()
    offloaded(host, weights, torch.randn(5, 6)).backward()
    assert way.log.count("fetch") == 2


def test_small_tensors_stay_where_they_are():
    weights, way = [torch.randn(6, 6, requires_grad=True) for _ in range(2)], Straight()
    offloaded(HostMemory(resident=1, way=way), weights, torch.randn(5, 6)).backward()
    assert way.log == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="layer inputs are offloaded from a CUDA device")
def test_layer_inputs_go_to_the_host_and_come_back():
    def gradients(mode):
        model, adapter = adapted("llama", "full", **WIDE)
        step = Step(model.cuda(), adapter, SupervisedLoss(Sft()))
        with recompute.install_recompute(model, mode):
            sum(step(random_batch((900, 500)).to(torch.device("cuda"))).sums.values()).backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients("offload"), strict=True))
