"""The linear layer that keeps a latent weight and multiplies by its quantized form."""

from __future__ import annotations

import copy
import zlib
from typing import Any, cast

import attrs
import torch
from luthier import LuthierError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from luthier_bitnet.choices import ChoosingLayer
from luthier_bitnet.uniform.grid import Estimator, Levels, quantize_values
from luthier_bitnet.uniform.observers import Range, observe


@attrs.define
class Phase:
    """The state that layers share: the share of rounding, from latent (0) to quantized (1), and the bits."""

    bits: float
    share: float = 1.0
    step: int = 0
    seed: int = 0
    calibrating: bool = False


@attrs.frozen(kw_only=True)
class Weights:
    """How weights are quantized: `group` is a number of neighbours, 0 for a whole row, -1 for the whole tensor."""

    group: int
    symmetric: bool
    observer: str
    percentile: float
    learned: bool
    estimator: Estimator
    noise: float
    tuned: bool = False


@attrs.frozen(kw_only=True)
class Activations:
    """How activations are quantized. If `samples` is above 0, by a kept range, measured from that many tokens."""

    levels: Levels
    by_token: bool
    observer: str
    percentile: float
    samples: int
    decay: float


class UniformLinear(ChoosingLayer):
    """A linear layer with a latent `weight` [out, in], or [in, out] if it replaces transformers' Conv1D."""

    def __init__(self, layer: nn.Linear | Conv1D, path: str, weights: Weights, activations: Activations | None) -> None:
        super().__init__()
        self.transposed = isinstance(layer, Conv1D)
        self.path, self.weights, self.activations = path, weights, activations
        self.weight: nn.Parameter = cast(nn.Parameter, layer.weight)  # Conv1D's is a parameter too
        self.bias: nn.Parameter | None
        self.scale: nn.Parameter | None
        self.range: Tensor | None
        self.register_parameter("bias", layer.bias)
        shape = layer.weight.shape[::-1] if self.transposed else layer.weight.shape
        self.out_features, self.in_features = shape
        self.register_parameter("scale", None)
        self.register_buffer("range", None)
        self._fitted: tuple[Any, tuple[Tensor, Tensor]] | None = None  # (the weight's state, scale and zero)
        self.train(layer.training)

    def prepare(self, phase: Phase, has_values: bool) -> None:
        """Take the shared phase, and create the learned scale or the kept range that the options ask for."""
        self.phase = phase
        latent = self.latent().detach()
        if self.weights.learned:
            first = latent.new_ones(self._rows(latent).shape[0]) if not has_values else self._fit(latent)[0].flatten()
            self.scale = nn.Parameter(first.float().clone(), requires_grad=self.weight.requires_grad)
        if self.activations is not None and self.activations.samples:
            self.range = torch.full((2,), float("nan"), device=self.weight.device)  # not measured yet
        if self.weights.tuned:
            self.allow_choice()

    @property
    def rounds_activations(self) -> bool:
        """What Luthier asks a layer, so that it compares the model's ways of computing with more patience."""
        return self.activations is not None

    @property
    def levels_bits(self) -> float:
        """Return the bits of this layer's weights."""
        return self.choice.bits or self.phase.bits

    @property
    def levels(self) -> Levels:
        return Levels.of(self.levels_bits, self.weights.symmetric)

    def latent(self) -> Tensor:
        """Return the latent weight [out, in], with its gradient."""
        return self.weight.T if self.transposed else self.weight

    def quantized(self) -> Tensor:
        """Return the quantized weight [out, in], with the gradient of its estimator."""
        latent = self.latent()
        rows = self._rows(latent)
        if self.scale is None:
            scale, zero = self._fit(latent.detach())
        else:
            scale, zero = self._learned_scale(rows), torch.zeros_like(self.scale)[:, None]
        values = quantize_values(rows, scale.to(rows.dtype), zero.to(rows.dtype), self.levels, self.weights.estimator)
        return self._unrows(values, latent)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the weight [out, in] that the layer multiplies by in evaluation, in float32."""
        latent, quantized = self.latent().float(), self.quantized().float()
        return quantized if self.phase.share == 1 else latent + self.phase.share * (quantized - latent)

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Set the latent weight [out, in]. A learned scale is initialised again."""
        self.latent().copy_(weight)
        self._fitted = None
        if self.scale is not None:
            self.scale.copy_(self._fit(self.latent())[0].flatten())

    def forward(self, states: Tensor) -> Tensor:
        """Map states [..., in] to [..., out], in the dtype of the states or of autocast."""
        share = self.phase.share
        if share == 0:
            return F.linear(states, self.latent(), self.bias)
        weight, latent = self.quantized(), self.latent()
        if self.training and self.weights.noise:
            weight = weight + self._noise(latent)
        weight = weight if share == 1 else latent + share * (weight - latent)
        if self.activations is not None:
            rounded = self._quantize_states(states, self.activations)
            states = rounded if share == 1 else states + share * (rounded - states)
        return F.linear(states, weight, self.bias)

    def _quantize_states(self, states: Tensor, how: Activations) -> Tensor:
        float_states = states.detach().float()
        flat = float_states.reshape(-1, self.in_features)
        if how.samples and self.training and self.phase.calibrating:
            self._measure(flat, how)
        if how.by_token:
            around = observe(float_states, how.levels, how.observer, how.percentile)
        elif self.range is not None and not bool(self.range.isnan().any()):
            around = Range(low=self.range[:1], high=self.range[1:])
        else:
            around = observe(flat.reshape(1, -1), how.levels, how.observer, how.percentile)
            around = Range(low=around.low[0], high=around.high[0])
        scale, zero = how.levels.lay(around)
        inside = Estimator(kind="straight_through" if self.range is None else "clipped")
        return quantize_values(states, scale.to(states.dtype), zero.to(states.dtype), how.levels, inside)

    @torch.no_grad()
    def _measure(self, flat: Tensor, how: Activations) -> None:
        """Measure the range in the first micro-batch of the step, once."""
        if getattr(self, "measured", None) == self.phase.step:
            return
        if len(flat) < how.samples and type(flat) is Tensor:  # a rehearsal's batches are not those of the run
            problem = f"a micro-batch has {len(flat)} tokens, but calibration needs {how.samples}"
            raise LuthierError("part-unsupported", problem, where=self.path,
                               remedy="Lower calibration_samples, or raise max_tokens_per_device.")  # fmt: skip
        places = torch.arange(how.samples, device=flat.device) * len(flat) // how.samples
        bounds = observe(flat[places].reshape(1, -1), how.levels, how.observer, how.percentile)
        new, before = torch.cat([bounds.low[0], bounds.high[0]]), cast(Tensor, self.range)  # as states are rounded
        self.range = new if bool(before.isnan().any()) else how.decay * before + (1 - how.decay) * new
        self.measured = self.phase.step

    def _fit(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero of each row of values, [rows, 1]. They are kept until weight or bits change."""
        weight, factor = self.weight, self.choice.factor
        state = (weight.data_ptr(), weight._version, self.phase.step, self.levels_bits, factor, weight.dtype)
        if self._fitted is not None and self._fitted[0] == state:
            return self._fitted[1]
        around = observe(self._rows(latent).float(), self.levels, self.weights.observer, self.weights.percentile)
        around = around if factor == 1 else Range(low=factor * around.low, high=factor * around.high)
        grid = self.levels.lay(around)
        plain = type(grid[0]) is Tensor and type(self.weight) is nn.Parameter and not torch.compiler.is_compiling()
        self._fitted = (state, grid) if plain and not grid[0].is_meta else None
        return grid

    def _learned_scale(self, rows: Tensor) -> Tensor:
        """Return the scale. Its gradient is divided by sqrt(values * levels), as in LSQ (arXiv 1902.08153)."""
        factor = 1 / (rows.shape[1] * self.levels.high) ** 0.5
        scale = cast(nn.Parameter, self.scale).abs().clamp(min=1e-8)[:, None]  # a learned scale exists
        return (scale - factor * scale).detach() + factor * scale

    def _noise(self, latent: Tensor) -> Tensor:
        """Return noise in units of the scale. It is a function of seed, step and layer."""
        key = (self.phase.seed * 1_000_003 + self.phase.step * 8191 + zlib.crc32(self.path.encode())) % 2**31
        random = torch.Generator().manual_seed(key)
        drawn = torch.randn(latent.shape, generator=random).to(latent.device, latent.dtype)
        steps = self._fit(latent.detach())[0] if self.scale is None else self.scale.detach().abs()[:, None]
        return self._unrows(self._rows(drawn) * steps.to(latent.dtype), latent) * self.weights.noise

    def _rows(self, weight: Tensor) -> Tensor:
        """Return the weight as rows of values that share a scale. A short last group repeats its last value."""
        if self.weights.group < 0:
            return weight.reshape(1, -1)
        if not self.weights.group:
            return weight
        short = -weight.shape[1] % self.weights.group
        if short:
            weight = torch.cat([weight, weight[:, -1:].expand(-1, short)], 1)
        return weight.reshape(-1, self.weights.group)

    def _unrows(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.reshape(like.shape[0], -1)[:, : like.shape[1]]

    def __deepcopy__(self, memo: dict[int, Any]) -> UniformLinear:
        """Copy the layer without the scales that it has kept."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        attributes = {name: value for name, value in self.__dict__.items() if name != "_fitted"}
        made.__dict__.update(copy.deepcopy(attributes, memo))
        made._fitted = None
        return made

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.levels_bits:g}"


class Ranges:
    """Save and restore the ranges that layers keep."""

    @staticmethod
    def collect(layers: dict[str, UniformLinear]) -> dict[str, Any]:
        return {path: layer.range for path, layer in layers.items() if layer.range is not None}

    @staticmethod
    def give(layers: dict[str, UniformLinear], ranges: dict[str, Any]) -> None:
        for path, values in ranges.items():
            layers[path].range = values.to(layers[path].weight.device)
