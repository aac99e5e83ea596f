"""Models whose operations are installed, and what a step of them gives."""

import torch
from luthier.model import attention
from luthier.model.policy import ModelPolicy
from luthier.testing.worlds import random_batch, tiny_model
from torch import nn

LENGTHS = (20, 9, 1, 33, 2)
LLAMA = {"norm": 5, "mlp": 2, "attention": 2, "layer": 2}
EXPECTED = {
    **{name: LLAMA for name in ("llama", "qwen2", "mistral", "granite")},
    "qwen3": {**LLAMA, "norm": 9},
    "gemma2": {"norm": 9, "mlp": 2, "attention": 2},
    "phi3": {"norm": 5, "mlp": 2},
    "mixtral": {"norm": 5, "attention": 2, "layer": 2},
    "gpt2": {},
    "gpt_neox": {},
}


def packed_model(architecture="llama", dtype=torch.float32):
    model = tiny_model(architecture).to(dtype)
    if architecture == "mixtral":
        model.set_experts_implementation("eager")  # grouped products know no float64
    attention.install_attention(model)
    return model


def step(model, lengths=LENGTHS):
    """Log-probabilities, and the gradients of their sum by name."""
    model.zero_grad(set_to_none=True)
    found = ModelPolicy(model).token_logprobs(random_batch(lengths))
    found.sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def counts(installed):
    return {kind: sum(classes.values()) for kind, classes in installed.replaced.items()}


def assert_same(mine, theirs, bound):
    torch.testing.assert_close(mine[0], theirs[0], rtol=bound, atol=bound)
    assert mine[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(mine[1][name], gradient, rtol=bound, atol=bound * 10, msg=name)


class Scaled(nn.Module):
    """An RMS norm in all but one thing."""

    def __init__(self, power=-0.5, offset=0.0):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6
        self.power, self.offset = power, offset

    def forward(self, x):
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        row = wide * (wide.pow(2).mean(-1, keepdim=True) + self.eps).pow(self.power)
        return (self.weight + self.offset) * row.to(x.dtype)


def attention_module(model=None):
    return (model or packed_model()).model.layers[0].self_attn


def wrapped_forward(module, change):
    """The same class, with a forward that `change` alters."""
    own = type(module)
    module.__class__ = type("Changed", (own,), {"forward": lambda self, *a, **k: change(own.forward, self, *a, **k)})
    return module
