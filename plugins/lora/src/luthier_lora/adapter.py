"""The parts `lora` and `dora`: they wrap weights, and save, load and merge the update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from luthier import Context, Group, LuthierError, Progress, fill_tensors, get_logger
from torch import Tensor, nn

from luthier_lora import files
from luthier_lora.coverage import coverage
from luthier_lora.experts import ParameterWrapper
from luthier_lora.extras import Extras, find_extras
from luthier_lora.grouping import count_parameters, make_groups, name_parameters
from luthier_lora.layers import Form, Switch, is_dense, sizes_of
from luthier_lora.merging import Update, fold, wrappers
from luthier_lora.options import Dora, Lora
from luthier_lora.patterns import check_patterns, check_ranks, rank_and_alpha
from luthier_lora.ranks import choose_ranks, hash_tensor
from luthier_lora.targets import Targets, find_targets, refuse_head_alone
from luthier_lora.wrappers import DoraLayer, LoraLayer, PissaLayer, principal_factors

USUAL_DROPOUT: Final = 0.05  # the share that LoRA drops where nothing is said, and nothing speaks against it


class LoraAdapter:
    """The adapter for the options of `lora` and `dora`."""

    rank_option = "r"

    def __init__(self, options: Lora | Dora) -> None:
        _refuse_with_parameters(options)
        self.options = options
        self.model: Any = None
        self.targets = Targets()
        self.extras = Extras()
        self._switch = Switch()

    def attach(self, model: Any, context: Context) -> Any:
        """Wrap the weights that the options name, and freeze the rest. A and B are drawn from the seed, on the CPU."""
        if wrappers(model):
            remedy = "Merge the adapter first, or load the model again."
            raise LuthierError("part-unsupported", "this model has an adapter already", remedy=remedy)
        self.options = _settle_dropout(self.options, context)
        self.targets = find_targets(model, self.options)
        if context.purpose != "open":  # a finished adapter of the head is read, merged and used
            refuse_head_alone(model, self.targets)
        check_patterns(self.options, self.targets)
        self.options = choose_ranks(model, self.options, self.targets, context)
        sizes = {name: sizes_of(model.get_submodule(name)) for name in self.targets.layers}
        check_ranks(self.options, sizes, context, self.rank_option)
        self.extras = find_extras(model, self.options, self.targets)
        if self.options.init_lora_weights == "loftq":
            _check_loss(model, self.targets)
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(context.seed)
        for name in self.targets.layers:
            model.set_submodule(name, self._layer(name, model.get_submodule(name), context, generator))
        for name, parameter in self.targets.parameters:
            module = model.get_submodule(name)
            inner = module.innermost if isinstance(module, ParameterWrapper) else module
            wrapper = ParameterWrapper(module, parameter, self._form(name, inner, context), self._switch)
            self._draw(wrapper, generator)
            model.set_submodule(name, wrapper)
        self.extras.stand(model, self._switch)
        self.model = model
        self._report()
        return model

    def groups(self) -> list[Group]:
        """Return A and B (with two rates for LoRA+), magnitudes without decay, biases and whole modules."""
        return make_groups(self.model, self._named(), self.options.loraplus_lr_ratio)

    def prepare(self, batch: Any) -> Any:
        return batch

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before, self._switch.enabled = self._switch.enabled, False
        try:
            yield
        finally:
            self._switch.enabled = before

    def gradients_ready(self) -> None:
        """Gradients stay as they are."""

    def stepped(self, progress: Progress) -> None:
        """Nothing follows a step."""

    def penalty(self) -> Tensor | None:
        return None

    def state(self) -> dict[str, Tensor]:
        """Return PEFT's name of each tensor -> the parameter, detached and not copied."""
        return {files.PREFIX + name: parameter.detach() for name, parameter in self._named().items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        fill_tensors(self.state(), state, "adapter state", "checkpoint-corrupt")

    def save(self, folder: Path) -> None:
        """Write a folder that plain PEFT loads."""
        files.save(
            Path(folder),
            files.describe(self.model, self.options, self.targets, self.extras),
            files.fold_scales(self.state()),
        )

    def load(self, folder: Path) -> None:
        """Read a folder of ours or PEFT's into the attached adapter. An error changes nothing."""
        files.load(Path(folder), self.model, self.options, self.targets, self.state())

    def merge(self, context: Context) -> Any:
        """Return the model with plain layers. Raises `artifact-unmergeable` for NaN, or if it is merged already."""
        if self.model is None:
            problem = "no adapter is attached, or it is merged already"
            raise LuthierError("artifact-unmergeable", problem, remedy="Attach it to a fresh base model.")
        model = fold(self.model, context)
        self.model, self.targets, self.extras = None, Targets(), Extras()
        return model

    def coverage(self) -> dict[str, Any]:
        """Return the names of adapted weights, their share of all base weights, and the rest by kind."""
        return coverage(self.model, [*self.targets.names, *self.extras.saved])

    def _named(self) -> dict[str, nn.Parameter]:
        """Return every trainable parameter by its path in the model."""
        assert self.model is not None, "the adapter is not attached"
        return name_parameters(self.model)

    def _layer(self, name: str, layer: nn.Module, context: Context, generator: torch.Generator) -> LoraLayer:
        form = self._form(name, layer, context)
        wrapper = self._class()(layer, form, self._switch, context.dequantize)
        self._draw(wrapper, generator)
        if isinstance(wrapper, DoraLayer):
            wrapper.begin()
        if isinstance(wrapper, PissaLayer) and context.has_values:
            wrapper.begin(*_factors("pissa", wrapper.base_weight(), form, context))
        if self.options.init_lora_weights == "loftq":
            _begin_at_loss(layer, wrapper, form, context)
        return wrapper

    def _class(self) -> type[LoraLayer]:
        if isinstance(self.options, Dora):
            return DoraLayer
        return PissaLayer if self.options.init_lora_weights == "pissa" else LoraLayer

    def _form(self, name: str, module: nn.Module, context: Context) -> Form:
        rank, alpha = rank_and_alpha(self.options, name)
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        double = any(tensor.dtype is torch.float64 for tensor in tensors)
        return Form(
            rank=rank,
            scale=alpha / rank**0.5 if self.options.use_rslora else alpha / rank,
            dropout=self.options.lora_dropout or 0.0,
            dtype=torch.float64 if double else torch.float32,
            device=tensors[0].device if tensors else context.device,
            trains_bias=self.options.bias != "none",
            learns_scale=self.options.learn_scale,
        )

    @torch.no_grad()
    def _draw(self, wrapper: Update, generator: torch.Generator) -> None:
        """Draw A from Kaiming's uniform distribution with a = sqrt(5), as PEFT does. B is zero, or drawn like A."""
        factors = [wrapper.lora_A] if self.options.init_lora_weights else [wrapper.lora_A, wrapper.lora_B]
        for factor in factors:
            drawn = torch.empty(factor.weight.shape, dtype=torch.float32)
            factor.weight.copy_(nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator))

    def _report(self) -> None:
        """Log which weights are adapted, since `all-linear` and the default depend on the model."""
        counts: dict[str, int] = {}
        for name in [*self.targets.names, *self.extras.saved]:
            end = name.rpartition(".")[2]
            counts[end] = counts.get(end, 0) + 1
        chosen = "q and v, or their equivalents" if self.options.target_modules is None else "as named"
        size = count_parameters(self._named())
        log = get_logger()
        log.info("adapter_attached", targets=counts, chosen=chosen, preset=self.options.preset, trainable=size)


def _settle_dropout(options: Lora | Dora, context: Context) -> Lora | Dora:
    """Return the options with a number for their dropout: a loss, or parameters outside layers, may want none."""
    if options.lora_dropout is not None:
        return options
    has_none = not context.dropout or (isinstance(options, Lora) and options.target_parameters)
    return attrs.evolve(options, lora_dropout=0.0 if has_none else USUAL_DROPOUT)


def _factors(kind: str, weight: Tensor, form: Form, context: Context) -> tuple[Tensor, Tensor]:
    """Return A and B of a weight's principal directions, cached on disk by its content."""
    key = f"{kind} {form.rank} {form.scale} {hash_tensor(weight)}"
    factors = context.cache(key, lambda: principal_factors(weight, form.rank, form.scale))
    return factors["A"], factors["B"]


def _begin_at_loss(layer: nn.Module, wrapper: LoraLayer, form: Form, context: Context) -> None:
    """Begin with the principal directions of a layer's quantization error (LoftQ, Li et al. 2023, arXiv 2310.08659).

    This is the first of LoftQ's alternations. Further ones would change the base, which is not in the adapter's files.
    A layer that is not quantized begins as usual, and so does an opened artifact, which has its own A and B.
    """
    if is_dense(layer) or not context.has_values or context.purpose == "open":
        return
    lost = context.original(layer).to(form.device) - wrapper.base_weight().float()
    if lost.any():  # of nothing both factors would be zero, and stay so
        for factor, value in zip((wrapper.lora_A, wrapper.lora_B), _factors("loftq", lost, form, context), strict=True):
            factor.weight.data.copy_(value)


def _check_loss(model: nn.Module, targets: Targets) -> None:
    """Raise `part-unsupported` where no adapted layer is quantized."""
    if all(is_dense(model.get_submodule(name)) for name in targets.layers):
        problem = "init_lora_weights loftq begins with what quantizing took from the weights, and none is quantized"
        remedy = "Set a quantizer, such as nf4, or leave init_lora_weights out."
        raise LuthierError("part-unsupported", problem, where="adapter.init_lora_weights", remedy=remedy)


def _refuse_with_parameters(options: Lora | Dora) -> None:
    """Raise `recipe-conflict` for options that updates of parameters outside layers do not have."""
    if not isinstance(options, Lora) or not options.target_parameters:
        return
    if options.lora_dropout:
        problem = "the update of a parameter has no inputs that could be dropped"
        remedy = "Leave lora_dropout out, or target_parameters."
        raise LuthierError("recipe-conflict", problem, where="target_parameters", remedy=remedy)
    for field, asked in (
        ("init_lora_weights", options.init_lora_weights in ("pissa", "loftq")),
        ("learn_scale", options.learn_scale),
    ):
        if asked:
            problem, remedy = "updates of parameters do not have this", f"Leave target_parameters or {field} out."
            raise LuthierError("recipe-conflict", problem, where=field, found=getattr(options, field), remedy=remedy)
