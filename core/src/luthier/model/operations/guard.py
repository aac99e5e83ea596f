"""The guard around an installed operation: compared with its reference at its first call, left out once it raises."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.model.operations.sample_calls import sample_call
from luthier.plugins.records import OperationRecord

log = get_logger()
DIFFERENTIATED: Final = {  # the positions of the arguments whose gradients are compared
    "rms_norm": (0, 1),
    "add_rms_norm": (0, 1, 2),
    "rope": (0, 1),
    "swiglu": (0, 1),
    "geglu": (0, 1),
    "linear": (0, 1, 2),
    "token_logprobs": (0, 1, 2),
    "document_attention": (0, 1, 2),
}
# roundings of the result's dtype by which a correct implementation may differ besides its tolerance
ROUNDINGS: Final = 4
Fallen = Callable[[str, str], None]  # called with the name and the reason


@attrs.define(kw_only=True, eq=False)
class GuardedOperation:
    """An installed operation in a run: `compute` gives its result, or NotImplemented where it must not be used."""

    record: OperationRecord
    owner: str  # distribution and version
    function: Callable[..., Any]
    reference: Callable[..., Any]
    supports: Callable[[torch.device, torch.dtype, torch.Size], bool] = lambda device, dtype, shape: True
    required: bool = False  # with `kernels: require` a failure is an error
    fallen: bool = False
    on_fall: Fallen = lambda name, reason: None
    _compared: dict[Any, bool] = attrs.field(factory=dict)  # by kind of call

    @property
    def num_compared(self) -> int:
        """Return the number of kinds of call that were compared with the reference."""
        return sum(self._compared.values())

    def compute(self, *arguments: Any, **named: Any) -> Any:
        """Return the result for the reference's arguments; NotImplemented where another must compute it."""
        if self.fallen:
            return NotImplemented
        given = bind_arguments(self.reference, arguments, named)
        try:
            result = self.function(*given)
            if result is not NotImplemented and (kind := _describe_call(given)) not in self._compared:
                self._compared[kind] = self._compare(given)
        except (torch.OutOfMemoryError, LuthierError):
            raise  # running out of memory is handled elsewhere
        except Exception as error:  # noqa: BLE001 - by the contract whatever an operation raises ends its use, aloud
            self._fall(error)
            return NotImplemented
        return result

    def _compare(self, given: Sequence[Any]) -> bool:
        """Return True if the operation computed a part of the call, or all of it, for the comparison.

        Raises `operation-differs` where values or gradients are not the reference's. Gradients of every place are
        asked for first, then that of the first place alone (a head may take frozen weights only), then none.
        """
        sample = sample_call(self.record.operation, given)
        calls = [sample, given] if self.supports(sample[0].device, sample[0].dtype, sample[0].shape) else [given]
        every = [i for i in DIFFERENTIATED[self.record.operation] if isinstance(given[i], Tensor)]
        for call, places in itertools.product(calls, (every, every[:1], [])):
            with _undisturbed():
                own = _differentiate(self.function, call, places, exact=False)
                if own is NotImplemented:
                    continue
                expected = _differentiate(self.reference, call, places, exact=True)
            self._check_results(own, expected, call, places)
            return True
        return False

    def _check_results(
        self, own: Sequence[Tensor], expected: Sequence[Tensor], call: Sequence[Any], places: Sequence[int]
    ) -> None:
        names = list(_signature(self.reference).parameters)
        count = len(expected) - len(places)
        labels = [*(f"result {i}" for i in range(count)), *(f"gradient of {names[i]}" for i in places)]
        coarsest = max((torch.finfo(call[i].dtype).eps for i in places), default=0.0)
        for number, (label, actual, wanted) in enumerate(zip(labels, own, expected, strict=True)):
            # even an exact float32 gradient may come from values that the call rounds, such as a sum in bfloat16
            self._check_close(label, actual, wanted, coarsest if number >= count else 0.0)

    def _check_close(self, label: str, computed: Tensor, wanted: Tensor, rounding: float) -> None:
        where = f"operation {self.record.name} ({self.owner})"
        remedy = f"Uninstall {self.owner.partition(' ')[0]}, or set kernels: reference."
        if computed is None or computed.shape != wanted.shape:
            shape = None if computed is None else list(computed.shape)
            problem = f"its {label} has another shape than {self.record.operation}'s reference, {list(wanted.shape)}"
            raise LuthierError("operation-differs", problem, where=where, found=shape, remedy=remedy)
        if not computed.numel():
            return
        largest = max(float(wanted.abs().max()), torch.finfo(torch.float32).tiny)
        share = float((computed.to(wanted.dtype) - wanted).abs().max()) / largest
        bound = self.record.tolerance + max(ROUNDINGS * torch.finfo(computed.dtype).eps, rounding)
        if not share <= bound:
            problem = f"its {label} differs from {self.record.operation}'s reference by {share:.2g} of the largest"
            raise LuthierError("operation-differs", f"{problem}; {bound:.2g} is allowed", where=where, remedy=remedy)

    def _fall(self, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if self.required:
            remedy = "Set kernels: auto to go on without it."
            problem = f"raised {reason}, and the recipe says kernels: require"
            raise LuthierError("operation-failed", problem, where=f"operation {self.record.name}",
                               remedy=remedy) from error  # fmt: skip
        self.fallen = True
        log.warning("operation fell back", name=self.record.operation, implementation=self.record.name, reason=reason)
        self.on_fall(self.record.name, reason)


def bind_arguments(reference: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments in the order of the reference's signature, its defaults filled in."""
    if not named and len(arguments) == len(_signature(reference).parameters):
        return tuple(arguments)
    bound = _signature(reference).bind(*arguments, **named)
    bound.apply_defaults()
    return bound.args


@functools.cache
def _signature(reference: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(reference)


def _describe_call(given: Sequence[Any]) -> Any:
    """Return what must be equal in two calls for one comparison to count for both: dtypes, devices, and what is no"""
    return tuple((a.dtype, a.device.type, a.dim()) if isinstance(a, Tensor) else repr(a) for a in given)


def _undisturbed() -> Any:
    """Plain arithmetic with gradients, unseen by whoever counts what is kept for backward."""
    from contextlib import ExitStack

    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept))
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _differentiate(function: Callable[..., Any], given: Sequence[Any], places: Sequence[int], *, exact: bool) -> Any:
    """Return the results of a call and its gradients at `places`, on copies; `exact`: computed in float64 where there
    is.
    """
    copies = [_copy(value, place in places, exact) for place, value in enumerate(given)]
    results = function(*copies)
    if results is NotImplemented:
        return NotImplemented
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    random = torch.Generator().manual_seed(0)  # leaves the process's own generator unchanged
    grads = [torch.randn(r.shape, generator=random).to(r.device, r.dtype) for r in results]
    inputs = [copies[i] for i in places]
    gradients = torch.autograd.grad(results, inputs, grads, allow_unused=True) if inputs else ()
    return [*(r.detach() for r in results), *(torch.zeros_like(i) if g is None else g
                                              for i, g in zip(inputs, gradients, strict=True))]  # fmt: skip


def _copy(value: Any, differentiated: bool, exact: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone()
    if exact and copy.is_floating_point() and copy.device.type != "mps":
        copy = copy.double()
    return copy.requires_grad_(differentiated)
