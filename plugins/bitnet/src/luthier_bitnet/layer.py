"""The linear layer that keeps a latent weight and multiplies by its ternary form."""

from __future__ import annotations

from typing import Any, cast

import attrs
import torch
from luthier_kernels import expand_codes, multiply_ternary, quantize_activations, quantize_ternary
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from luthier_bitnet.choices import ChoosingLayer

EPS = 1e-5  # of a layer's own norm
LIMIT = 1.5  # in scales: a small step cannot change the level of a larger weight


@attrs.define
class Stage:
    """The progress of its layers from latent weights (0) to ternary ones (1)."""

    share: float = 1.0


@attrs.frozen(kw_only=True)
class Form:
    """How a weight is rounded: `granularity` is tensor, row or a group size; `integers` means int8 activations."""

    method: str
    granularity: str | int
    integers: bool
    clipped: bool
    tuned: bool = False


class TernaryLinear(ChoosingLayer):
    """A linear layer with a latent `weight` [out, in], or [in, out] if it replaces transformers' Conv1D."""

    def __init__(self, layer: nn.Linear | Conv1D, form: Form, stage: Stage) -> None:
        super().__init__()
        self.transposed = isinstance(layer, Conv1D)
        self.form, self.stage = form, stage
        self.weight: nn.Parameter = cast(nn.Parameter, layer.weight)  # Conv1D's is a parameter too
        self.bias: nn.Parameter | None
        self.register_parameter("bias", layer.bias)
        shape = layer.weight.shape[::-1] if self.transposed else layer.weight.shape
        self.out_features, self.in_features = shape
        self.sub_norm: nn.RMSNorm | None = None
        if form.tuned:
            self.allow_choice()
        self._codes: tuple[Any, ...] | None = None  # of a frozen weight: (its state, codes, scales)
        self.train(layer.training)

    def add_norm(self, size: float) -> None:
        """Normalize the inputs from here on, to a root mean square of `size` for each token at first."""
        weight = self.weight.new_full((self.in_features,), size)
        self.sub_norm = nn.RMSNorm(self.in_features, eps=EPS, device=weight.device, dtype=weight.dtype)
        self.sub_norm.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)

    @property
    def rounds_activations(self) -> bool:
        """What Luthier asks a layer, so that it compares the model's ways of computing with more patience."""
        return self.form.integers

    def latent(self) -> Tensor:
        """Return the latent weight [out, in], with its gradient."""
        return self.weight.T if self.transposed else self.weight

    def rounded(self) -> tuple[Tensor, Tensor]:
        """Return the codes [out, in] int8 and their scales. For a frozen weight they are computed once."""
        if self.weight.requires_grad or torch.compiler.is_compiling() or type(self.weight) is not nn.Parameter:
            self._codes = None
            return self._quantize()
        state = (self.weight.data_ptr(), self.weight._version, self.weight.device, self.choice.factor)
        if self._codes is not None and self._codes[0] == state:
            return self._codes[1], self._codes[2]
        codes, scales = self._quantize()
        self._codes = (state, codes, scales) if type(codes) is Tensor else None  # codes of a rehearsal have no values
        return codes, scales

    def _quantize(self) -> tuple[Tensor, Tensor]:
        return quantize_ternary(self.latent(), self.form.granularity, self.form.method, self.choice.factor)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the weight [out, in] that the layer multiplies by, in float32."""
        codes, scales = self.rounded()
        ternary = expand_codes(codes, scales, self.form.granularity)
        latent = self.latent().float()
        return ternary if self.stage.share == 1 else latent + self.stage.share * (ternary - latent)

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Set the latent weight [out, in]."""
        self.latent().copy_(weight)
        self._codes = None

    def forward(self, states: Tensor) -> Tensor:
        """Map states [..., in] to [..., out], in the dtype of the states or of autocast."""
        if self.stage.share == 0:
            return F.linear(states, self.latent(), self.bias)
        if self.sub_norm is not None:
            normed = self._normalized(states, self.sub_norm)
            states = normed if self.stage.share == 1 else states + self.stage.share * (normed - states)
        codes, scales = self.rounded()
        weight = self.latent()
        if self.form.clipped and weight.requires_grad:
            weight = _Clipped.apply(weight, LIMIT * _spread(scales, self.form.granularity, weight.shape[1]))
        if self.stage.share < 1:
            return self._partly(states, weight, codes, scales)
        output = multiply_ternary(states, weight, codes, scales, self.form.granularity, self.form.integers)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _normalized(self, states: Tensor, norm: nn.RMSNorm) -> Tensor:
        """In float32, rounded once to the dtype of the states."""
        wide = states.float()
        factors = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        return (wide * factors * norm.weight.float()).to(states.dtype)

    def _partly(self, states: Tensor, weight: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """Compute with partly rounded weights and states: values plus the stage's share of their rounding error."""
        ternary = expand_codes(codes, scales, self.form.granularity, weight.dtype)
        weight = weight + self.stage.share * (ternary - weight).detach()
        if self.form.integers:
            rounded, steps = quantize_activations(states)
            states = states + self.stage.share * ((rounded * steps).to(states.dtype) - states).detach()
        return F.linear(states, weight, self.bias)

    def extra_repr(self) -> str:
        form = f"{self.form.method}, {self.form.granularity}, {'int8' if self.form.integers else 'exact'} activations"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {form}"

    def __deepcopy__(self, memo: dict[int, Any]) -> TernaryLinear:
        """Copy the layer without the codes that it has kept."""
        import copy

        made = type(self).__new__(type(self))
        memo[id(self)] = made
        attributes = {name: value for name, value in self.__dict__.items() if name != "_codes"}
        made.__dict__.update(copy.deepcopy(attributes, memo))
        made._codes = None
        return made


class _Clipped(torch.autograd.Function):
    """The identity, whose gradient is 0 where the weight's magnitude is above the limit."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, limit: Tensor) -> Tensor:
        ctx.save_for_backward(weight.abs() <= limit)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


def _spread(scales: Tensor, granularity: str | int, columns: int) -> Tensor:
    """Return scales that broadcast over a weight."""
    return scales.repeat_interleave(granularity, 1)[:, :columns] if isinstance(granularity, int) else scales
