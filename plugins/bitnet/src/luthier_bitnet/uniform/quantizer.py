"""The quantizers `qat` and `qat_activations`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from luthier import Context, LuthierError, Multipliers, Progress, check_finite_weights, get_logger
from torch import Tensor, nn

from luthier_bitnet.ending import Ending
from luthier_bitnet.targets import choose_layers
from luthier_bitnet.tuning import Tuner
from luthier_bitnet.uniform.grid import Estimator, Levels
from luthier_bitnet.uniform.layer import Activations, Phase, Ranges, UniformLinear, Weights
from luthier_bitnet.uniform.options import Qat, QatActivations

log = get_logger()


class UniformQuantizer:
    """A quantizer that trains linear weights to evenly spaced levels. It leaves exact what `ternary` does."""

    def __init__(self, options: Qat) -> None:
        self.options, self.phase = options, Phase(bits=options.bits)
        self.name = "qat_activations" if isinstance(options, QatActivations) else "qat"
        self.layers: dict[str, UniformLinear] = {}
        self.tuner, self.ending = Tuner(options.tuning), Ending(self.name)
        self.needs_metrics = self.tuner.needs_metrics

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Replace each chosen layer by a `UniformLinear` with the same weight, in place. A second call changes nothing.

        Raises what `ternary` raises, and `part-unsupported` if ranges would differ from rank to rank.
        """
        self._check_ranks()
        self.ending.purpose = context.purpose
        self.layers, chosen = find_uniform(model), choose_layers(model, self.options.skip_modules, self.name)
        if not chosen and not self.layers:
            problem = f"quantizer '{self.name}' finds no linear layer to quantize"
            raise LuthierError("part-unsupported", problem, where=type(model).__name__)
        if context.has_values:
            check_finite_weights(chosen, "bitnet:nonfinite-weight")
        for earlier in self.layers.values():
            self.phase = earlier.phase
        self.phase.seed = context.seed
        made: dict[int, UniformLinear] = {}  # a layer that is used in two places stays one layer
        for path, layer in chosen.items():
            if id(layer) not in made:
                made[id(layer)] = UniformLinear(layer, path, self._weights(), self._activations())
                made[id(layer)].prepare(self.phase, context.has_values)
            model.set_submodule(path, made[id(layer)])
        self.layers = find_uniform(model)
        log.info(f"prepared for {self.name}", layers=len(self.layers), bits=self.options.bits)
        return model

    def dequantize(self, layer: nn.Module) -> Tensor | None:
        return layer.dense() if isinstance(layer, UniformLinear) else None

    def requantize(self, layer: nn.Module, weight: Tensor) -> None:
        """Set the latent weight [out, in] of a layer of this quantizer."""
        if not isinstance(layer, UniformLinear):
            problem = f"this is not a layer of quantizer '{self.name}'"
            raise LuthierError("part-unsupported", problem, found=type(layer).__name__)
        layer.put(weight)

    def progressed(self, progress: Progress) -> Multipliers:
        """Set the share of rounding, the bits, and whether this step measures activations."""
        o, phase = self.options, self.phase
        bits = self._bits(progress)
        if bits != phase.bits:
            log.info("stage", quantizer=self.name, bits=bits, step=progress.step)
        phase.bits, phase.share, phase.step = bits, o.schedule.share(progress), progress.step
        self.ending.look(progress, phase.share)
        if isinstance(o, QatActivations) and o.online_calibration:
            phase.calibrating = progress.step % o.calibration_frequency == 0
        return Multipliers()

    def needed_tokens(self, step: int) -> Mapping[str, int]:
        """Return the tokens that one measurement of ranges takes, at the steps that measure."""
        o = self.options
        if not isinstance(o, QatActivations) or not o.online_calibration or step % o.calibration_frequency:
            return {}
        return {"calibration_samples": o.calibration_samples}

    def tune(self, metrics: Mapping[str, float], evaluate: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        """Let the next layers try what the options say. What the validation rows do not bear is taken back."""
        return self.tuner.tune(self.layers, metrics, evaluate) if self.phase.share == 1 else metrics

    def state(self) -> dict[str, Any]:
        return {"ranges": Ranges.collect(self.layers), "tuning": self.tuner.state(self.layers)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        Ranges.give(self.layers, state.get("ranges", {}))
        self.tuner.load_state(self.layers, state.get("tuning", {}))

    def _bits(self, progress: Progress) -> float:
        stages = [*self.options.bits_stages, self.options.bits]
        if not progress.total_steps:
            return stages[-1]
        return stages[min(progress.step * len(stages) // progress.total_steps, len(stages) - 1)]

    def _weights(self) -> Weights:
        o = self.options
        return Weights(
            group={"tensor": -1, "row": 0, "group": o.group_size}[o.sharing],
            symmetric=o.symmetric,
            observer=o.observer,
            percentile=o.percentile,
            learned=o.learn_scale,
            estimator=Estimator(kind=o.estimator, temperature=o.temperature),
            noise=o.noise_factor,
            tuned=o.tuning.tries,
        )

    def _activations(self) -> Activations | None:
        o = self.options
        if not isinstance(o, QatActivations):
            return None
        return Activations(
            levels=Levels.of(o.activation_bits, o.activation_symmetric),
            by_token=o.activation_granularity == "token",
            observer=o.activation_observer,
            percentile=o.percentile,
            samples=o.calibration_samples if o.online_calibration else 0,
            decay=o.calibration_decay,
        )

    def _check_ranks(self) -> None:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if getattr(self.options, "online_calibration", False) and together and torch.distributed.get_world_size() > 1:
            problem = "each process would measure different ranges"
            raise LuthierError("part-unsupported", problem, where=f"{self.name}.online_calibration",
                               remedy="Leave online_calibration out, or train in one process.")  # fmt: skip


def find_uniform(model: nn.Module) -> dict[str, UniformLinear]:
    """Return the layers of these quantizers by their path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, UniformLinear)}
