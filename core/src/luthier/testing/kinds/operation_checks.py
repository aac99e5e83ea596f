"""Checks of operations: they have the values and gradients of the reference, for every form of call by a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from luthier.testing.laws import Subject, law

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from luthier.model.operations.guard import GuardedOperation

DTYPES: Final = ("float32", "float64", "bfloat16", "float16")
SIZES: Final = ((5, 8), (1, 16), (33, 24))  # (rows, width)


@law(0)
def gives_the_values_and_gradients_of_the_reference(subject: Subject) -> None:
    """The operation gives the values and gradients of the plain-torch reference, within its tolerance.

    Every form of call that its predicate accepts is tried, in several sizes and dtypes.
    """
    taken = compared = 0
    for arguments, supported in _calls(subject):
        guard = _guard(subject)
        if supported and guard.compute(*arguments) is not NotImplemented:
            taken, compared = taken + 1, compared + guard.num_compared
    assert taken, "it declines every call that was tried, by its predicate or by NotImplemented"
    assert compared, "it declines every call that it was to be compared by, with gradients and without"


@law(0)
def leaves_its_arguments_alone(subject: Subject) -> None:
    """The operation writes to no argument, because the model uses them again."""
    import torch
    from torch import Tensor

    operation = _build(subject)
    for arguments, supported in _calls(subject):
        if supported:
            before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
            operation(*arguments)
            same = [torch.equal(a, b) for a, b in zip(arguments, before, strict=True) if isinstance(a, Tensor)]
            assert all(same), "it writes into its arguments"


@law(0)
def gives_the_same_numbers_twice(subject: Subject) -> None:
    """Two calls with the same arguments give the same bits, so that a resumed run equals an undisturbed one."""
    import torch

    operation = _build(subject)
    for arguments, supported in _calls(subject):
        if supported:
            first, second = (_listed(operation(*arguments)) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two calls differ"


@law(0)
def predicate_reads_device_dtype_and_shape_alone(subject: Subject) -> None:
    """The predicate returns True or False for any device, dtype and shape, without touching a tensor."""
    import torch

    supports = _predicate(subject.record)
    for device in ("cpu", "cuda", "mps", "meta"):
        for dtype in (getattr(torch, name) for name in (*DTYPES, "int64")):
            for shape in ((0, 8), (1, 1), (1, 4, 7, 8), (3, 5, 2)):
                answer = supports(torch.device(device), dtype, torch.Size(shape))
                assert isinstance(answer, bool), f"the predicate gives {answer!r} for {device}, {dtype}, {shape}"


def live(subject: Subject, options: Any) -> None:
    """Build the part under these options and call it."""
    operation = subject.build(options)
    for arguments, supported in _calls(subject):
        if supported:
            operation(*arguments)


def _build(subject: Subject) -> Any:
    return subject.build(subject.options_class())


def _guard(subject: Subject) -> GuardedOperation:
    from luthier.model.operations.guard import GuardedOperation
    from luthier.model.operations.signatures import REFERENCES

    record: Any = subject.record
    return GuardedOperation(
        record=record,
        owner="the kit",
        function=_build(subject),
        reference=REFERENCES[record.operation],
        supports=_predicate(record),
        required=True,
    )


def _predicate(record: Any) -> Any:
    from luthier.testing.laws import register_record

    plugins, offer = register_record(record)
    return plugins.resolve(offer, record.predicate)


def _calls(subject: Subject) -> Iterator[tuple[tuple[Any, ...], bool]]:
    """Yield arguments, and True if the predicate accepts them."""
    import torch

    record: Any = subject.record
    supports = _predicate(record)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random = torch.Generator().manual_seed(0)
    for dtype in (getattr(torch, name) for name in DTYPES):
        for rows, width in SIZES:
            for arguments in example_calls(record.operation, rows, width, random):
                moved = tuple(_moved(a, device, dtype) for a in arguments)
                yield moved, supports(device, dtype, moved[0].shape)


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    from torch import Tensor

    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def example_calls(operation: str, rows: int, width: int, random: torch.Generator) -> Iterator[tuple[Any, ...]]:
    """Yield arguments in float32, as a model gives them, one form of call after another."""
    import torch

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    x, weight = made(1, rows, width), made(width)
    if operation == "rms_norm":
        yield from ((x, weight, 1e-6, offset, rounded, None) for offset in (0.0, 1.0) for rounded in (True, False))
    elif operation == "add_rms_norm":
        yield from ((x, residual, weight, 1e-6, 0.0, True, None) for residual in (None, made(1, rows, width)))
    elif operation == "rope":
        yield made(1, 4, rows, width), made(1, 2, rows, width), made(1, rows, width), made(1, rows, width), None
    elif operation in ("swiglu", "geglu"):
        yield x, made(1, rows, width)
    elif operation == "linear":
        yield from ((x, made(2 * width, width), bias) for bias in (None, made(2 * width)))
    elif operation == "token_logprobs":
        labels = torch.randint(0, 50, (rows,), generator=random)
        for bias, scale, cap in ((None, 1.0, None), (made(50), 1.0, None), (None, 0.5, 3.0)):
            yield made(rows, width), made(50, width) / width**0.5, bias, labels, scale, cap
    else:
        yield from _attention_calls(rows, width, made)


def _attention_calls(rows: int, width: int, made: Any) -> Iterator[tuple[Any, ...]]:
    import torch

    starts = torch.tensor([0, *([rows // 3] if rows > 3 else []), rows])
    none = [-1] * (len(starts) - 1)
    continued = torch.tensor([-1, *([0] * (len(none) - 1))])
    for links, window, cap in ((None, None, None), (continued, None, None), (None, 2, None), (None, None, 2.0)):
        query, key, value = made(1, 4, rows, width), made(1, 2, rows, width), made(1, 2, rows, width)
        yield query, key, value, starts, links, width**-0.5, window, cap


def _listed(result: Any) -> list[Tensor]:
    if result is NotImplemented:
        return []
    return list(result) if isinstance(result, (tuple, list)) else [result]
