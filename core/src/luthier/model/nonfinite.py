"""Hooks over every module of a model, put there for one pass: who made the first number that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from luthier.data.batches.batch import Batch
from luthier.plugins.contracts.values import LossOutput

LOSS: Final = "the loss"
SHOWN: Final = 3  # the most rows that a message names


@attrs.frozen(kw_only=True)
class Finding:
    """Where the first number that is not finite was made. `micro_batch` counts from 1; None where there is none."""

    cause: str  # parameter, data, forward, backward, norm or none
    place: str  # the path of a parameter or module, or an empty text
    told: str  # a sentence without its final dot
    micro_batch: int | None = None
    where: tuple[str, ...] = ()  # file:line of the affected rows

    def to_plain(self) -> dict[str, Any]:
        return {**attrs.asdict(self), "where": list(self.where)}

    @property
    def rows(self) -> str | None:
        """Return the rows for an error's place: the first few, and how many more there are."""
        more = len(self.where) - SHOWN
        shown = ", ".join(self.where[:SHOWN])
        return (f"{shown} and {more} more row{'s' * (more > 1)}" if more > 0 else shown) or None


@attrs.define(eq=False)
class Met:
    """Who made a tensor and who read it, innermost last; kept on the tensor, so that it goes when that goes."""

    made: list[str] = attrs.field(factory=list)
    read: list[str] = attrs.field(factory=list)


class Watch:
    """Hooks over every module of a step; `found` is the first that made a number not finite of finite ones."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.calls = batches, 0
        self.found: Finding | None = None
        self.names: dict[nn.Module, str] = {}
        # for each module under way: True if its inputs are finite, and the largest input
        self.entered: list[tuple[bool, float]] = []

    @contextmanager
    def over(self, model: nn.Module, step: nn.Module | None = None) -> Iterator[None]:
        """Watch the model, and the step around it, while it lasts; the modules are then as they were."""
        loss = {} if step is None else {step: LOSS}
        self.names = {**loss, **{module: name or "the model" for name, module in model.named_modules()}}
        with ExitStack() as stack:
            for module in self.names:
                before = module.register_forward_pre_hook(self._before, with_kwargs=True)
                after = module.register_forward_hook(self._after, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    stack.callback(parameter.register_hook(self._weight_hook(name)).remove)
            yield

    @property
    def number(self) -> int:
        """Return the number of the micro-batch under way, from 1; a loss that couples the batch runs each one twice."""
        return (self.calls - 1) % len(self.batches) + 1

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.names[module] == LOSS:
            self.calls += 1
        inputs = list(floating_tensors((args, kwargs)))
        self.entered.append((all(is_finite(t) for t in inputs), max((_largest(t) for t in inputs), default=0.0)))
        for tensor in inputs:
            self._follow(tensor, self.names[module], "read")

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        clean, largest = self.entered.pop()
        for tensor in floating_tensors(output):
            if clean and self.found is None and not is_finite(tensor):
                self._blame_forward(module, tensor, largest)
            self._follow(tensor, self.names[module], "made")

    def _blame_forward(self, module: nn.Module, output: Tensor, largest: float) -> None:
        name, batch = self.names[module], self.batches[self.number - 1]
        if name == LOSS:
            text = "every module's output is finite, and the loss made of them, or the head's logits, is not"
        else:
            given = f"{name} ({type(module).__name__}) gave {describe_nonfinite(output)}"
            text = f"{given} from finite inputs up to {largest:.3g}"
        self.found = Finding(cause="forward", place=name, told=f"{text}, {self._of()}", micro_batch=self.number,
                             where=rows_of(output, batch))  # fmt: skip

    def _follow(self, tensor: Tensor, name: str, role: str) -> None:
        """Look at the tensor's gradient when backward brings it."""
        if not tensor.requires_grad or tensor.is_leaf:
            return
        met: Met | None = getattr(tensor, "_luthier_met", None)
        if met is None:
            met = tensor._luthier_met = Met()  # type: ignore[attr-defined]
            tensor.register_hook(self._gradient_hook(met, self.number))
        getattr(met, role).append(name)

    def _gradient_hook(self, met: Met, number: int) -> Any:
        def look(gradient: Tensor) -> None:
            if self.found is None and not is_finite(gradient):
                self._blame_backward(_culprit(met), gradient, number)

        return look

    def _weight_hook(self, name: str) -> Any:
        def look(gradient: Tensor) -> None:
            if self.found is None and not is_finite(gradient):
                self._blame_backward(f"the weight {name}", gradient, self.number)

        return look

    def _blame_backward(self, place: str, gradient: Tensor, number: int) -> None:
        text = f"forward is finite, and the gradient at {place} became {describe_nonfinite(gradient)}, {self._of()}"
        where = rows_of(gradient, self.batches[number - 1])
        self.found = Finding(cause="backward", place=place.removeprefix("the weight "), told=text, micro_batch=number,
                             where=where)  # fmt: skip

    def _of(self) -> str:
        return f"in micro-batch {self.number} of {len(self.batches)}"


def _culprit(met: Met) -> str:
    """Return the module whose backward made a gradient: the innermost that read the tensor, or the one around its
    maker.
    """
    innermost = [a for a in met.read if not any(b != a and b.startswith(f"{a}.") for b in met.read)]
    if LOSS in innermost and len(innermost) > 1:
        innermost.remove(LOSS)
    if innermost:
        return " or ".join(dict.fromkeys(innermost))
    maker = met.made[-1]
    return maker.rpartition(".")[0] or LOSS


def floating_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of floating-point numbers in what a module takes or gives."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, LossOutput):
        yield from floating_tensors(value.sums)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from floating_tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from floating_tensors(item)


def local_part(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that is spread over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_finite(tensor: Tensor) -> bool:
    shard = local_part(tensor.detach())
    return not shard.is_floating_point() or bool(shard.isfinite().all())


def describe_nonfinite(tensor: Tensor) -> str:
    """Return what is not finite in a tensor, in words: `3 NaN`, `inf, beyond the largest float16, 6.55e+04`."""
    shard = local_part(tensor.detach())
    nan, infinite = int(shard.isnan().sum()), int(shard.isinf().sum())
    beyond = f"{infinite:,} inf, beyond the largest {dtype_of(shard)}, {torch.finfo(shard.dtype).max:.3g}"
    parts = [f"{nan:,} NaN"] if nan else []
    return " and ".join([*parts, beyond] if infinite else parts)


def _largest(tensor: Tensor) -> float:
    shard = local_part(tensor.detach())
    known = shard[shard.isfinite()]
    return float(known.abs().max()) if known.numel() else 0.0


def dtype_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def rows_of(value: Any, batch: Batch) -> tuple[str, ...]:
    """Return the rows of the tokens that are not finite; all rows if the tensor does not run over the tokens."""
    shard = local_part(value.detach())
    along = [i for i, size in enumerate(shard.shape) if size == batch.num_tokens][:1]
    if not along or len(batch.where) != batch.num_documents:
        return batch.where
    bad = ~shard.isfinite().movedim(along[0], 0).reshape(batch.num_tokens, -1).all(1)
    documents = batch.document_ids().to(bad.device)[bad].unique().tolist()
    return tuple(batch.where[d] for d in documents) or batch.where


def trace_model(model: nn.Module, batch: Batch, work: Callable[[], object]) -> Finding | None:
    """Return what makes `work`, a pass of a model over `batch` without gradient, not finite; None for nothing."""
    finding = _parameter(model)
    if finding is not None:
        return finding
    watch = Watch([batch])
    with torch.no_grad(), watch.over(model):
        work()
    return watch.found


def _parameter(model: nn.Module) -> Finding | None:
    # only NaN counts, because a mask may be infinite
    buffers = [(name, leaf) for name, leaf in model.named_buffers() if leaf.isnan().any()]
    for name, leaf in (*model.named_parameters(), *buffers):
        if not is_finite(leaf):
            return Finding(cause="parameter", place=name, told=f"the parameter {name} holds {describe_nonfinite(leaf)}")
    return None
