"""The part `slao`: one low-rank pair that trains on task after task, and is merged after each.

Whatever the number of tasks, two pairs are kept for each layer: the A and B in use, and another pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from luthier import PEFT_WEIGHTS, Context, Group, LuthierError, check_tensors, fill_tensors, get_logger
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier_slao import Slao, files
from luthier_slao.algebra import merge_factor, merge_share, orthonormal_rows, relative_drift
from luthier_slao.layers import SlaoLayer, check_rank, find_layers, read_whole, write_whole

log = get_logger()


class SlaoAdapter:
    """The adapter for the options of `slao`."""

    def __init__(self, options: Slao) -> None:
        self.options = options
        self.needs_metrics = {} if options.max_loss_rise is None else {"max_loss_rise": "eval_loss"}
        self.model: Any = None
        self.layers: dict[str, SlaoLayer] = {}
        self.num_merged = 0  # number of tasks whose B is in the merged B
        self._replaced: dict[str, tuple[Tensor, Tensor]] = {}  # the merged pair before the last merge, until its review

    def attach(self, model: Any, context: Context) -> Any:
        """Wrap the target layers. A is drawn from the run's seed, as in LoRA, and B is zero."""
        names = find_layers(model, self.options.target_modules)
        if context.purpose != "open":
            check_rank(model, names, self.options.r)
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(context.seed)
        scale = self.options.lora_alpha / self.options.r
        for name in names:
            layer = SlaoLayer(
                model.get_submodule(name), self.options.r, scale, self.options.lora_dropout, context.device
            )
            drawn = nn.init.kaiming_uniform_(torch.empty(layer.lora_A.weight.shape), a=5**0.5, generator=generator)
            with torch.no_grad():
                layer.lora_A.weight.copy_(drawn)
            model.set_submodule(name, layer)
            self.layers[name] = layer
        self.model = model
        return model

    def groups(self) -> list[Group]:
        named = self._named()
        return [Group(parameters=list(named.values()), names=list(named), role="adapter")]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before = [layer.enabled for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer, enabled in zip(self.layers.values(), before, strict=True):
                layer.enabled = enabled

    @torch.no_grad()
    def begin_task(self, index: int, total: int) -> None:
        """Make the rows of A orthonormal, and set the B from which the task begins. The first begins as LoRA."""
        if self.num_merged == 0:
            return
        for layer in self.layers.values():
            merged, trained = read_whole(layer.lora_B.weight), read_whole(layer.other_B)
            write_whole(layer.other_A, read_whole(layer.lora_A.weight))
            write_whole(layer.lora_A.weight, orthonormal_rows(read_whole(layer.lora_A.weight)))
            first = {"last_trained": trained, "last_merged": merged, "zero": torch.zeros_like(merged)}
            write_whole(layer.lora_B.weight, first[self.options.begin_from])
            write_whole(layer.other_B, merged)

    @torch.no_grad()
    def end_task(self, index: int, total: int) -> None:
        """Merge B into that of the earlier tasks. A merge that drifts too far is refused, as if there were no task."""
        share = merge_share(self.options.merge_weight, self.num_merged + 1)
        moved = {name: self._merged(layer, share) for name, layer in self.layers.items()}
        self._replaced = self._earlier() if self.num_merged else {}
        if self._drifts(moved):
            self._restore(self._replaced)
            self._replaced = {}
            return
        for name, layer in self.layers.items():
            write_whole(layer.other_B, read_whole(layer.lora_B.weight))
            write_whole(layer.lora_B.weight, moved[name])
        self.num_merged += 1

    @torch.no_grad()
    def review_task(self, evaluate: Callable[[], float]) -> None:
        """Take the merge back if it has raised the held-out loss by more than `max_loss_rise`."""
        limit, replaced, self._replaced = self.options.max_loss_rise, self._replaced, {}
        if limit is None or not replaced:
            return
        after, merged = evaluate(), self._in_use()
        self._use(replaced)
        before = evaluate()
        if after - before <= limit:
            self._use(merged)
            return
        log.warning("merge refused: the held-out loss rises", before=round(before, 4), after=round(after, 4),
                    max_loss_rise=limit)  # fmt: skip
        self._restore(replaced)
        self.num_merged -= 1

    def _earlier(self) -> dict[str, tuple[Tensor, Tensor]]:
        layers = self.layers.items()
        return {name: (read_whole(layer.other_A), read_whole(layer.other_B).clone()) for name, layer in layers}

    def _in_use(self) -> dict[str, tuple[Tensor, Tensor]]:
        pairs = {name: (layer.lora_A.weight, layer.lora_B.weight) for name, layer in self.layers.items()}
        return {name: (read_whole(a), read_whole(b).clone()) for name, (a, b) in pairs.items()}

    def _use(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (a, b) in pairs.items():
            write_whole(self.layers[name].lora_A.weight, a)
            write_whole(self.layers[name].lora_B.weight, b)

    def _restore(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Use the merged pair of the tasks before, from which the next task then begins."""
        self._use(pairs)
        for name, (_, b) in pairs.items():
            write_whole(self.layers[name].other_B, b)

    def state(self) -> dict[str, Any]:
        """Return A and B under PEFT's names, the other pair of each layer, and the number of merged tasks."""
        sides = [(name, layer, side) for name, layer in self.layers.items() for side in ("other_A", "other_B")]
        others = {f"{name}.{side}": getattr(layer, side).detach() for name, layer, side in sides}
        own = {name: parameter.detach() for name, parameter in self._named().items()}
        return {**own, **others, "num_merged": self.num_merged}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `state`. Raises `checkpoint-corrupt` if rank or targets have changed."""
        self._fill(state, "adapter state", "checkpoint-corrupt")

    @torch.no_grad()
    def _fill(self, state: Mapping[str, Any], where: str, code: str) -> None:
        tensors = {name: tensor for name, tensor in self.state().items() if isinstance(tensor, Tensor)}
        given = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        check_tensors(tensors, given, where, code)
        files.check_finite(given, where, code)
        fill_tensors(tensors, given, where, code)
        self.num_merged = int(state["num_merged"])

    def save(self, folder: Path) -> None:
        """Write a folder that plain PEFT loads, and in it what the next task needs."""
        own = {name: parameter.detach() for name, parameter in self._named().items()}
        others = {name: layer.other_B for name, layer in self.layers.items()}
        files.save_adapter(folder, self.model, self.options, own)
        files.save_accumulator(folder, others, self.num_merged)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises `artifact-mismatch` for another rank, base or targets."""
        tensors, others, number = files.load_adapter(folder, self.options)
        first = {n.replace(".lora_A.weight", ".other_A"): t for n, t in tensors.items() if n.endswith(".lora_A.weight")}
        given = {**tensors, **first, **{f"{name}.other_B": t for name, t in others.items()}, "num_merged": number}
        self._fill(given, str(Path(folder) / PEFT_WEIGHTS), "artifact-mismatch")

    @torch.no_grad()
    def merge(self, context: Context) -> Any:
        """Return the model with each update merged into its weight. A quantized layer becomes a dense one."""
        for name, layer in self.layers.items():
            update, base = layer.update_weight(), layer.base_layer
            if not update.isfinite().all():
                raise LuthierError("artifact-unmergeable", "the adapter holds NaN or infinity", where=name)
            self.model.set_submodule(name, _plain_layer(base, context.dequantize(base) + update, context))
        self.layers = {}
        return self.model

    def _named(self) -> dict[str, nn.Parameter]:
        sides = [(name, layer, side) for name, layer in self.layers.items() for side in ("lora_A", "lora_B")]
        return {f"{name}.{side}.weight": getattr(layer, side).weight for name, layer, side in sides}

    def _merged(self, layer: SlaoLayer, share: float) -> Tensor:
        return merge_factor(read_whole(layer.other_B), read_whole(layer.lora_B.weight), share)

    def _drifts(self, moved: Mapping[str, Tensor]) -> bool:
        limit = self.options.max_drift
        if limit is None or self.num_merged == 0:
            return False
        drifts = {name: relative_drift(read_whole(self.layers[name].other_B), tensor) for name, tensor in moved.items()}
        worst = max(drifts, key=drifts.__getitem__)
        if drifts[worst] <= limit:
            return False
        log.warning("merge refused: it drifts too far", layer=worst, drift=round(drifts[worst], 4), max_drift=limit)
        return True


def _plain_layer(base: Any, weight: Tensor, context: Context) -> nn.Module:
    """Return the base layer with the weight [out, in], or a dense layer instead of a quantized one."""
    if type(base) in (nn.Linear, Conv1D):
        context.requantize(base, weight)
        return base
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=getattr(base, "bias", None) is not None)
    dense.to(device=weight.device, dtype=context.dtype).requires_grad_(False).train(base.training)
    dense.weight.copy_(weight)
    if dense.bias is not None:
        dense.bias.copy_(base.bias)
    return dense
