"""The quantizers `ternary` and `bitnet`: they replace linear layers by ternary ones and follow the schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from luthier import Context, LuthierError, Multipliers, Progress, check_finite_weights, get_logger
from torch import Tensor, nn

from luthier_bitnet.ending import Ending
from luthier_bitnet.layer import Form, Stage, TernaryLinear
from luthier_bitnet.options import Bitnet, Ternary
from luthier_bitnet.sub_norms import choose_sizes
from luthier_bitnet.targets import choose_layers
from luthier_bitnet.tuning import Tuner

log = get_logger()


class TernaryQuantizer:
    """A quantizer that trains linear layers to be ternary. Embeddings, head, norms, routers and tied weights stay."""

    def __init__(self, options: Ternary) -> None:
        self.options, self.stage = options, Stage()
        self.mergeable = not isinstance(options, Bitnet)  # as plain layers do not round activations
        self.name = "bitnet" if isinstance(options, Bitnet) else "ternary"
        self.form = Form(
            method=options.method,
            granularity={"group": options.group_size}.get(options.granularity, options.granularity),
            integers=self.name == "bitnet",
            clipped=options.estimator == "clipped",
            tuned=options.tuning.tries,
        )
        self.layers: dict[str, TernaryLinear] = {}
        self.tuner, self.ending = Tuner(options.tuning), Ending(self.name)
        self.needs_metrics = self.tuner.needs_metrics

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Replace each chosen layer by a `TernaryLinear` with the same weight, in place. A second call changes nothing.

        Raises `model-target` if an entry of `skip_modules` names no module, `part-unsupported` if no layer is chosen or
        the model is quantized already, and `bitnet:nonfinite-weight` if a weight holds NaN or infinity.
        """
        self.ending.purpose = context.purpose
        if self.options.sub_norms:
            self.mergeable = False  # plain layers have no norms of their own
        ternary_layers, chosen = find_layers(model), choose_layers(model, self.options.skip_modules, self.name)
        if not chosen and not ternary_layers:
            problem = f"quantizer '{self.name}' finds no linear layer to quantize"
            raise LuthierError("part-unsupported", problem, where=type(model).__name__)
        if context.has_values:
            check_finite_weights(chosen, "bitnet:nonfinite-weight")
        sizes = choose_sizes(model, chosen, self.options.sub_norms, context) if chosen else {}
        for earlier in ternary_layers.values():
            self.stage = earlier.stage
        made: dict[int, TernaryLinear] = {}  # a layer that is used in two places stays one layer
        for path, layer in chosen.items():
            if id(layer) not in made:
                made[id(layer)] = TernaryLinear(layer, self.form, self.stage)
                if path in sizes:
                    made[id(layer)].add_norm(sizes[path])
            model.set_submodule(path, made[id(layer)])
        self.layers = find_layers(model)
        count = sum(layer.weight.numel() for layer in made.values())
        exact = sum(parameter.numel() for parameter in model.parameters()) - count
        log.info(f"prepared for {self.name}", layers=len(made), weights=count, left_exact=exact)
        return model

    def dequantize(self, layer: nn.Module) -> Tensor | None:
        return layer.dense() if isinstance(layer, TernaryLinear) else None

    def requantize(self, layer: nn.Module, weight: Tensor) -> None:
        """Set the latent weight [out, in] of a layer of this quantizer."""
        if not isinstance(layer, TernaryLinear):
            problem = f"this is not a layer of quantizer '{self.name}'"
            raise LuthierError("part-unsupported", problem, found=type(layer).__name__)
        layer.put(weight)

    def progressed(self, progress: Progress) -> Multipliers:
        """Set the stage of the layers. In the second stage the rate falls and weight decay ends."""
        self.stage.share = self.options.schedule.share(progress)
        self.ending.look(progress, self.stage.share)
        start, rate = self.options.second_stage_start, self.options.second_stage_lr
        if start is None or not progress.total_steps or progress.step < start * progress.total_steps:
            return Multipliers()
        return Multipliers(lr=rate, weight_decay=0.0)

    def tune(self, metrics: Mapping[str, float], evaluate: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        """Let the next layers try other thresholds. What the validation rows do not bear is taken back."""
        return self.tuner.tune(self.layers, metrics, evaluate) if self.stage.share == 1 else metrics

    def state(self) -> dict[str, Any]:
        return {"tuning": self.tuner.state(self.layers)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.tuner.load_state(self.layers, state.get("tuning", {}))


def find_layers(model: nn.Module) -> dict[str, TernaryLinear]:
    """Return the ternary layers of a model by their path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, TernaryLinear)}
