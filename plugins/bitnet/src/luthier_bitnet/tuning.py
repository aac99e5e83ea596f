"""Tuning by validation: layers try other ranges and bits, and take back what the validation rows do not bear."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from luthier import get_logger

from luthier_bitnet.choices import Choice, ChoosingLayer
from luthier_bitnet.options import RangeTuning

log = get_logger()
Metrics = Mapping[str, float]
LOSS = "eval_loss"


class Tuner:
    """Lets one layer after another try choices. `tried` counts the layers that had their turn."""

    def __init__(self, options: RangeTuning) -> None:
        self.options, self.tried = options, 0

    @property
    def needs_metrics(self) -> dict[str, str]:
        """Return the evaluation metric that the option `tuning` reads, if there is something to try."""
        return {"tuning": LOSS} if self.options.tries else {}

    def tune(self, layers: Mapping[str, ChoosingLayer], metrics: Metrics, evaluate: Callable[[], Metrics]) -> Metrics:
        """Return the metrics of what was kept. Whatever `evaluate` raises, all layers are as they were before."""
        if not self.options.tries:
            return metrics
        before = ({path: layer.choice for path, layer in layers.items()}, self.tried)
        try:
            for _ in range(min(self.options.layers, len(layers))):
                path = list(layers)[self.tried % len(layers)]
                metrics = self._try_layer(path, layers[path], metrics, evaluate)
                self.tried += 1
        except BaseException:
            for path, choice in before[0].items():
                layers[path].choose(choice)
            self.tried = before[1]
            raise
        return metrics

    def state(self, layers: Mapping[str, ChoosingLayer]) -> dict[str, Any]:
        """Return the place in the order of layers, and what each layer has chosen; nothing if nothing is tried."""
        if not self.options.tries:
            return {}
        return {"tried": self.tried, "choices": {path: layer.chosen for path, layer in layers.items()}}

    def load_state(self, layers: Mapping[str, ChoosingLayer], state: Mapping[str, Any]) -> None:
        self.tried = state.get("tried", 0)
        for path, chosen in state.get("choices", {}).items():
            layers[path].choose(Choice.of(chosen))

    def _try_layer(self, path: str, layer: ChoosingLayer, metrics: Metrics, evaluate: Callable[[], Metrics]) -> Metrics:
        for factor in self.options.factors:
            before = layer.choice
            trial = Choice(factor=before.factor * factor, bits=before.bits)
            metrics, _ = self._try_choice(path, layer, trial, metrics, evaluate, 1 - self.options.min_gain)
        for bits in self.options.fewer_bits:
            if bits >= layer.levels_bits:
                continue
            trial = Choice(factor=layer.choice.factor, bits=bits)
            metrics, is_better = self._try_choice(path, layer, trial, metrics, evaluate, 1 + self.options.allowed_rise)
            if not is_better:
                break  # still fewer bits would be worse
        return metrics

    def _try_choice(
        self,
        path: str,
        layer: ChoosingLayer,
        trial: Choice,
        metrics: Metrics,
        evaluate: Callable[[], Metrics],
        limit: float,
    ) -> tuple[Metrics, bool]:
        """Keep a choice if the loss is below `limit` times what it was (or equal to it, for a limit above 1)."""
        before, loss = layer.choice, metrics[LOSS]
        layer.choose(trial)
        bits = layer.levels_bits
        measured = evaluate()
        allowed = loss + (limit - 1) * abs(loss)
        is_better = measured[LOSS] < allowed or (limit > 1 and measured[LOSS] == allowed)
        is_better = is_better and math.isfinite(measured[LOSS])
        if not is_better:
            layer.choose(before)
        log.info("tuning", layer=path, factor=round(trial.factor, 4), bits=bits,
                 kept=is_better, eval_loss=measured[LOSS], before=loss)  # fmt: skip
        return (measured if is_better else metrics), is_better
