"""The part `peft.<method>`: any of PEFT's methods behind the adapter protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from luthier import Context, Group, LuthierError, Progress
from torch import Tensor

from luthier_peft import files, grouping, merging, packing
from luthier_peft.adalora import Budget
from luthier_peft.injection import WRAPPERS, inject, tensors_of
from luthier_peft.methods import METHODS, UNTRIED
from luthier_peft.options import PREFIX, to_config


class PeftAdapter:
    """Keeps the adapter protocol around a `PeftModel`, of which nobody else learns: the model itself is returned."""

    needs = frozenset({"dense-weights"})  # also where the part is handed over as an object, without its record
    provides = frozenset({"reference", "trainable-weights"})

    def __init__(self, options: Any) -> None:
        self.options = options
        self.method = METHODS.get(options.method, UNTRIED)
        # of layers that keep a latent weight PEFT knows as little as of quantized ones
        self.conflicts = frozenset({"quantized-base", "packing"} if self.method.packing else {"quantized-base"})
        self.where = f"adapter {PREFIX}{options.method}"
        self.model: Any = None
        self._handle: Any = None
        self._budget: Budget | None = None
        self._names: frozenset[str] = frozenset()  # of PEFT's tensors, and of those of the base that train
        self._trains: frozenset[str] = frozenset()
        self._trained_base: dict[str, Tensor] = {}  # base parameters that train in place (biases), as they were
        self._disabled = False
        to_config(options, **self._total_step(0))  # refuses wrong options before the model is loaded

    def attach(self, model: Any, context: Context) -> Any:
        """Put PEFT's layers into the model, freeze the rest, and probe packed documents against separate ones.

        Raises `model-target`, `recipe-out-of-range`, `part-unsupported` or `train-nothing`.
        """
        config = to_config(self.options, **self._total_step(context.total_steps))
        base = dict(tensors_of(model))
        # A model that is at fault itself is the engine's to name; a method known to fail is kept away by its record.
        probing = not self.method.packing and context.probe(model) is None
        self._handle, self._budget = inject(model, config, context, self.where), None
        self.model = model
        known = {id(tensor) for tensor in base.values()}
        own = {n: t for n, t in self._tensors().items() if id(t) not in known or t.requires_grad}
        self._names, self._trains = frozenset(own), frozenset(n for n, t in own.items() if t.requires_grad)
        self._trained_base = {n: t.detach().clone() for n, t in self._trainable.items() if id(t) in known}
        if not any(parameter.numel() for parameter in self._trainable.values()):
            raise LuthierError("train-nothing", "PEFT leaves nothing to train with these options", where=self.where)
        if hasattr(self._handle.base_model, "rankallocator"):
            self._budget = Budget(self._handle, context.total_steps, self.where)
        if probing:
            packing.check(model, list(self._trainable.values()), context, self.where)
        return model

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in the model, as it is there now: sharding puts others in their place."""
        return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors_of(self._handle)}

    @property
    def _own(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._tensors().items() if name in self._names}

    @property
    def _trainable(self) -> dict[str, Any]:
        return {name: tensor for name, tensor in self._tensors().items() if name in self._trains}

    def groups(self) -> list[Group]:
        return grouping.groups(self.model, self._trainable)

    def prepare(self, batch: Any) -> Any:
        return batch

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, bit for bit: PEFT's layers pass through, and biases that train are as they were."""
        if self._disabled:
            yield
            return
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self._disabled = True
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)
            self._disabled = False
            for parameter, flag in flags:  # PEFT freezes while it disables
                parameter.requires_grad_(flag)

    def gradients_ready(self) -> None:
        if self._budget is not None:
            self._budget.hold_gradients()

    def stepped(self, progress: Progress) -> None:
        if self._budget is not None:
            self._budget.allocate(progress)

    def penalty(self) -> Tensor | None:
        return None if self._budget is None else self._budget.penalty()

    def state(self) -> dict[str, Any]:
        """Every tensor of PEFT's, the frozen random ones as well: a resumed run must not draw or decompose anew."""
        state: dict[str, Any] = {"tensors": {name: tensor.detach() for name, tensor in self._own.items()}}
        if self._budget is not None:
            state["budget"] = self._budget.state()
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        files.copy_into(self._own, state["tensors"], self.where)
        if self._budget is not None:
            self._budget.load_state(state["budget"])

    def save(self, folder: Path) -> None:
        with ExitStack() as stack:
            if self._budget is not None:
                stack.enter_context(self._budget.pattern_for(self._budget.settled_pattern()))
            files.save(self._handle, folder)

    def load(self, folder: Path) -> None:
        """Read a folder of ours or of plain PEFT's; `artifact-mismatch` where method, options or tensors differ."""
        found, tensors = files.read(folder)
        files.check_config(self._handle.peft_config[files.ADAPTER], found, str(folder))
        if self._budget is None:
            files.put(self._handle, tensors, str(folder))
            return
        pattern = found.get("rank_pattern")
        with self._budget.pattern_for(None):
            files.put(self._handle, self._budget.unpruned(tensors, pattern), str(folder))
        self._budget.config.rank_pattern = pattern

    def merge(self, context: Context) -> Any:
        """The model with plain layers again. `artifact-unmergeable` where the method has no weights to fold in."""
        merging.check(self.model, self.method, self.options, self.where)
        return merging.merge(self._handle, self._trainable, self.where)

    def _total_step(self, total_steps: int | None) -> dict[str, int]:
        """AdaLoRA's `total_step`, for the methods that have it: the run's steps where the options name none."""
        if not hasattr(self.options, "total_step") or self.options.total_step is not None:
            return {}
        if total_steps is None:
            problem, remedy = "the run has no known number of steps", "Set total_step, or max_steps."
            raise LuthierError("recipe-missing", problem, where=f"{self.where}.total_step", remedy=remedy)
        least = self.options.tinit + self.options.tfinal + 1  # for an adapter that is only loaded, outside of a run
        return {"total_step": total_steps or least}

    def _switch(self, enabled: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, WRAPPERS):
                module.enable_adapters(enabled)
        own = self._own if self._trained_base else {}
        for name, other in self._trained_base.items():
            parameter = own[name]
            parameter.data, self._trained_base[name] = other, parameter.data


def build(options: Any) -> PeftAdapter:
    """The part for an options object of `luthier_peft.options`."""
    return PeftAdapter(options)
