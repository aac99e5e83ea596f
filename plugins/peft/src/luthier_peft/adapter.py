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
from luthier_peft.targets import check_rank, check_start, name_head, refuse_head_alone


class PeftAdapter:
    """An adapter around a `PeftModel`. The model itself is returned, so that the rest of Luthier does not see PEFT."""

    needs = frozenset({"dense-weights"})  # also for an object in Python, which has no record
    provides = frozenset({"reference", "trainable-weights"})

    def __init__(self, options: Any) -> None:
        self.options = options
        self.method = METHODS.get(options.method, UNTRIED)
        # PEFT cannot handle layers with a latent weight, nor quantized ones
        self.conflicts = frozenset({"quantized-base", "packing"} if self.method.packing else {"quantized-base"})
        self.where = f"adapter {PREFIX}{options.method}"
        self.model: Any = None
        self._handle: Any = None
        self._budget: Budget | None = None
        self._names: frozenset[str] = frozenset()  # names of PEFT's tensors, and of base tensors that train
        self._trains: frozenset[str] = frozenset()
        self._trained_base: dict[str, Tensor] = {}  # base parameters that train in place (biases), as they were
        self._disabled = False
        to_config(options, **self._total_step(0))  # wrong options are refused before the model is loaded

    def attach(self, model: Any, context: Context) -> Any:
        """Put PEFT's layers into the model, freeze the rest, and check that packing does not mix documents.

        Raises `model-target`, `recipe-out-of-range`, `part-unsupported` or `train-nothing`.
        """
        config = to_config(self.options, **self._total_step(context.total_steps))
        base, head = dict(tensors_of(model)), name_head(model)
        # The core reports a model that is itself at fault; the record keeps away a method that is known to fail.
        probing = not self.method.packing and context.probe(model) is None
        self._handle, self._budget = inject(model, config, context, self.where), None
        self.model = model
        if context.purpose != "open":  # a finished adapter is read as it is
            self._check_chosen(head)
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

    def _check_chosen(self, head: str | None) -> None:
        """Raise if the layers that PEFT has adapted are the head alone, or too small for the rank."""
        check_start(self.options, self.where)
        names = self._handle.base_model.targeted_module_names
        if not self.method.trains_modules:
            refuse_head_alone(head, names, self.where)
        if self.method.rank:
            option = self.method.rank
            check_rank(self.model, names, getattr(self.options, option), f"{self.where}.{option}")

    def _tensors(self) -> dict[str, Tensor]:
        """Return every tensor by its name in the model, read anew because sharding replaces tensors."""
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
        """Compute with the base model, bit for bit: PEFT's layers pass through, and trained biases are restored."""
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
        """Return every tensor of PEFT, also frozen random ones, which a resumed run must not draw again."""
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
        """Read a folder of ours or PEFT's. Raises `artifact-mismatch` if method, options or tensors differ."""
        config, tensors = files.read(folder)
        files.check_config(self._handle.peft_config[files.ADAPTER], config, str(folder))
        if self._budget is None:
            files.put(self._handle, tensors, str(folder))
            return
        pattern = config.get("rank_pattern")
        with self._budget.pattern_for(None):
            files.put(self._handle, self._budget.unpruned(tensors, pattern), str(folder))
        self._budget.config.rank_pattern = pattern

    def merge(self, context: Context) -> Any:
        """Return the model with plain layers. Raises `artifact-unmergeable` if the method has no merged form."""
        merging.check(self.model, self.method, self.options, self.where)
        return merging.merge(self._handle, self._trainable, self.where)

    def _total_step(self, total_steps: int | None) -> dict[str, int]:
        """Return AdaLoRA's `total_step`, for methods that have it: the run's steps unless the options name it."""
        if not hasattr(self.options, "total_step") or self.options.total_step is not None:
            return {}
        if total_steps is None:
            problem, remedy = "the run has no known number of steps", "Set total_step, or max_steps."
            raise LuthierError("recipe-missing", problem, where=f"{self.where}.total_step", remedy=remedy)
        least = self.options.tinit + self.options.tfinal + 1  # enough for an adapter that is only loaded, outside a run
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
    """Return the part for an options object of `luthier_peft.options`."""
    return PeftAdapter(options)
