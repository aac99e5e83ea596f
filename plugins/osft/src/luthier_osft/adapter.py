"""The part `osft`: it trains part of each weight, task after task, and writes its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from luthier import Context, Group, LuthierError, Progress, check_tensors
from torch import Tensor, nn

from luthier_osft import Osft, files
from luthier_osft.base_weights import choose_trained, group_by_role
from luthier_osft.decompose import decompose_cached, decompose_once
from luthier_osft.factored import FactoredLayer
from luthier_osft.layers import OsftLayer, Switch, is_dense, is_shard, read_whole, take_prefixed
from luthier_osft.merging import fold_layers
from luthier_osft.ranks import find_ranks, scheduled_rank
from luthier_osft.targets import find_layers


class OsftAdapter:
    """The adapter for the options of `osft`.

    It provides no reference, so that the core keeps the initial values of what trains: at the beginning of a later task
    the policy is not the base, and with `train_non_targets` the base is not restored.
    """

    def __init__(self, options: Osft) -> None:
        self.options = options
        self.model: Any = None
        self.layers: dict[str, OsftLayer] = {}
        self.in_place: list[str] = []  # weights of the base that train in place
        self._switch = Switch()

    def attach(self, model: Any, context: Context) -> Any:
        """Replace each target by an `OsftLayer`, decompose the weights, and freeze the rest."""
        if any(isinstance(module, OsftLayer) for module in model.modules()):
            remedy = "Merge the adapter first, or load the model again."
            raise LuthierError("part-unsupported", "this model has an adapter already", remedy=remedy)
        ratio = None if self.options.rank_rule == "schedule" else self.options.ratio
        targets = find_layers(model, self.options)
        model.requires_grad_(False)
        self.model, self.context = model, context
        if ratio == 0:
            return model
        wrapped = [name for name in targets if ratio != 1 or not is_dense(model.get_submodule(name))]
        ranks = find_ranks(model, wrapped, self.options, context)
        kind = FactoredLayer if self.options.form == "factored" else OsftLayer
        for name in wrapped:
            layer = kind(model.get_submodule(name), ranks[name], self._switch, context.device)
            model.set_submodule(name, layer)
            self.layers[name] = layer
        if context.purpose == "open":
            pass  # it is filled from its files
        elif context.task_index > 0:
            self._expect_task()
        elif context.has_values:
            self._decompose(ranks)
        if ratio == 1 or self.options.train_non_targets:
            self.in_place = choose_trained(model, set(targets), with_targets=ratio == 1)
        return model

    def groups(self) -> list[Group]:
        named = self._named()
        own = Group(parameters=list(named.values()), names=list(named), role="adapter")
        return [*([own] if named else []), *group_by_role(self.model, set(self.in_place))]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        if self.in_place:
            problem = "weights of the base train in place, so the base cannot be restored"
            raise LuthierError("part-unsupported", problem, where="adapter", remedy="Set train_non_targets: false.")
        before, self._switch.enabled = self._switch.enabled, False
        try:
            yield
        finally:
            self._switch.enabled = before

    def gradients_ready(self) -> None:
        """Project the gradients of factors before clipping, so that the norm is that of the usable part."""
        for layer in self._factored():
            layer.project_gradients()

    def stepped(self, progress: Progress) -> None:
        """Project the factors back into their subspace, which optimizers leave."""
        for layer in self._factored():
            layer.project(layer.left.detach(), layer.right.detach())

    @torch.no_grad()
    def begin_task(self, index: int, total: int) -> None:
        """Decompose the weights as earlier tasks left them, and begin a new change. The first task is attached so."""
        if index == 0:
            return
        advance = self.context.progress(len(self.layers), "decompose weights")
        for layer in self.layers.values():
            if layer.before is None and is_shard(next(iter(layer.trained().values()))):
                problem = "a sharded model that was attached for the first task cannot train a later one"
                remedy = "Attach the adapter with context.task_index of the task."
                raise LuthierError("part-unsupported", problem, where="adapter", remedy=remedy)
            weight, rank = self._weight(layer), self._task_rank(layer, index, total)
            layer.begin_again(weight, decompose_once(weight, rank, self.context, tails=self._has_tails), rank)
            advance()

    def state(self) -> dict[str, Any]:
        """Return what trains, and on a sharded model the frozen tensors, whose files have no constants."""
        own: dict[str, Any] = {name: parameter.detach() for name, parameter in self._named().items()}
        base = dict(self.model.named_parameters())
        own |= {name: base[name].detach() for name in self.in_place}
        return {**own, **self.constants()} if any(is_shard(t) for t in own.values()) else own

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `state`. Raises `checkpoint-corrupt` if ratio, form or targets have changed."""
        self._fill(state, "adapter state", "checkpoint-corrupt")

    def constants(self) -> dict[str, Tensor]:
        """Return the bases of every layer, and the weights as earlier tasks left them."""
        return {f"{n}.{key}": tensor for n, layer in self.layers.items() for key, tensor in layer.frozen().items()}

    def load_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Restore what `constants` returned. Raises `checkpoint-corrupt` if it belongs to other layers."""
        files.check_frozen(self.layers, constants, "adapter constants", "checkpoint-corrupt")
        for name, layer in self.layers.items():
            layer.load_frozen(take_prefixed(constants, f"{name}."))

    def save(self, folder: Path) -> None:
        """Write the trained tensors and the bases as safetensors, and their description as JSON."""
        frozen = self.constants()
        trained = {name: tensor for name, tensor in self.state().items() if name not in frozen}
        files.save_adapter(Path(folder), self.options, self.layers, trained, frozen)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises `artifact-mismatch` for another form, ratio, base or targets."""
        trained, frozen = files.load_adapter(Path(folder), self.options, self.layers)
        where = str(Path(folder) / files.WEIGHTS)
        files.check_frozen(self.layers, frozen, where, "artifact-mismatch")
        self._check_trained(trained, where, "artifact-mismatch")  # before anything changes
        for name, layer in self.layers.items():
            layer.load_frozen(take_prefixed(frozen, f"{name}."))
        self._fill(trained, where, "artifact-mismatch")

    def merge(self, context: Context) -> Any:
        """Return the model with plain layers. Raises `artifact-unmergeable` for NaN, or if it is merged already."""
        if self.model is None:
            problem = "no adapter is attached, or it is merged already"
            raise LuthierError("artifact-unmergeable", problem, remedy="Attach it to a fresh base model.")
        weights = {name: (layer, self._weight(layer)) for name, layer in self.layers.items()}
        model = fold_layers(self.model, weights, context)
        self.model, self.layers, self.in_place = None, {}, []
        return model

    def _decompose(self, ranks: Mapping[str, int]) -> None:
        """Decompose the weights of the base for the first task."""
        advance = self.context.progress(len(self.layers), "decompose weights")
        for name, layer in self.layers.items():
            weight = self.context.dequantize(layer.base_layer).to(layer.dtype)
            layer.begin(decompose_cached(weight, ranks[name], self.context, tails=self._has_tails), ranks[name])
            advance()

    def _expect_task(self) -> None:
        """Make room for a later task. `begin_task` decomposes what the task before has left."""
        context = self.context
        for layer in self.layers.values():
            weight = context.dequantize(layer.base_layer) if context.has_values else None
            layer.expect_task(self._task_rank(layer, context.task_index, context.num_tasks), weight)

    def _task_rank(self, layer: OsftLayer, index: int, total: int) -> int:
        """Return the number of directions of a layer that a task preserves."""
        if self.options.rank_rule == "schedule":
            return scheduled_rank(min(layer.out_features, layer.in_features), index, total)
        return layer.rank

    @property
    def _has_tails(self) -> bool:
        return self.options.form == "factored"

    @torch.no_grad()
    def _weight(self, layer: OsftLayer) -> Tensor:
        """Return the weight [out, in] with which the layer computes, whole on every rank."""
        before = self.context.dequantize(layer.base_layer) if layer.before is None else read_whole(layer.before)
        return before.to(layer.dtype) + layer.change_weight()

    def _factored(self) -> list[FactoredLayer]:
        return [layer for layer in self.layers.values() if isinstance(layer, FactoredLayer)]

    def _named(self) -> dict[str, nn.Parameter]:
        return {f"{n}.{key}": p for n, layer in self.layers.items() for key, p in layer.trained().items()}

    @torch.no_grad()
    def _check_trained(self, given: Mapping[str, Any], where: str, code: str) -> dict[str, Tensor]:
        """Return the trained tensors, to be filled from `given`, or raise `code` if they do not fit it."""
        constants = self.constants()
        parameters = {name: tensor for name, tensor in self.state().items() if name not in constants}
        trained = {name: tensor for name, tensor in given.items() if not files.is_frozen(name, self.layers)}
        check_tensors(parameters, trained, where, code)
        files.check_finite(trained, where, code)
        return parameters

    def _fill(self, given: Mapping[str, Any], where: str, code: str) -> None:
        parameters = self._check_trained(given, where, code)
        frozen = {name: tensor for name, tensor in given.items() if files.is_frozen(name, self.layers)}
        if frozen:
            self.load_constants(frozen)
        for name, tensor in parameters.items():
            tensor.copy_(given[name])
