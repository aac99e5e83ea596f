"""The compiler: whether elementwise passes of the run are compiled, and the kernels that torch makes of them."""

from __future__ import annotations

import getpass
import hashlib
import inspect
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from luthier.data.stream.row_stream import sampled_rows
from luthier.errors import LuthierError
from luthier.logs import get_logger
from luthier.model.operations import formulas, kernels
from luthier.model.operations.functions import list_implementations
from luthier.model.operations.kernels import Gate, Kernels, NormForm
from luthier.runs.writing.decisions import Decisions

if TYPE_CHECKING:
    from luthier.step.setup import Setup

log = get_logger()
NAME: Final = "torch_compile"
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
# variants of one kernel (dtypes, widths and strides) that a model may need; token counts are no variants
VARIANTS: Final = 32

# Measured on a Zen 4 core with tokens of 512 to 1408 elements in bfloat16, eager against compiled kernels, forward and
# backward: nanoseconds saved per element of a norm, of query and key, and of a gated activation.
SAVED: Final = {"norm": 1.2, "rope": 0.8, "silu": 1.0, "gelu": 4.7}
COLD_SECONDS: Final = 40.0  # seconds until all kernels are compiled, with an empty cache on disk
WARM_SECONDS: Final = 5.0  # seconds if an earlier run like this one has filled the cache


@attrs.frozen(kw_only=True)
class Facts:
    """The facts by which `auto` is decided. `tokens` of this process over the whole run, None without a known end."""

    device: str
    compiler: str | None
    tokens: float | None
    saved: float  # CPU nanoseconds per token
    threads: int
    warm: bool


def choose(facts: Facts) -> tuple[bool, str]:
    """Return whether compiling pays back within the run, and why."""
    if facts.device != "cpu":
        return False, f"it was measured on processors, not on {facts.device}"
    if facts.compiler is None:
        return False, "there is no C++ compiler here"
    if not facts.saved:
        return False, "nothing of this model is compiled"
    cost = WARM_SECONDS if facts.warm else COLD_SECONDS
    if facts.tokens is None:
        return True, "the run has no end to pay back by"
    gain = facts.tokens * facts.saved * 1e-9 / facts.threads
    reason = f"about {gain:.0f} s saved over {facts.tokens:.2g} tokens, for {cost:.0f} s of compiling"
    return gain > cost, reason


def compiler() -> str | None:
    """Return the C++ compiler that torch would call: `CXX`, or the system's own."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def refuse_compile(asked: bool | str, device: torch.device) -> None:
    """Raise `dependency-missing` where `torch_compile: true` has no compiler to call."""
    if asked is True and device.type == "cpu" and compiler() is None:
        remedy = "Install g++ (or name a compiler in CXX), or set torch_compile: auto."
        raise LuthierError("dependency-missing", "no C++ compiler is here", where=NAME, found=asked, remedy=remedy)


def settle_compile(setup: Setup) -> bool:
    """Decide it for the run, and let its operations prefer compiled kernels where that is so.

    Called once the process has its threads, whose number the compiler builds into what it makes.
    """
    asked, decisions, installed = setup.recipe.torch_compile, setup.decisions, setup.operations
    saved = sum(SAVED[kind] * width for kind, width in installed.widths.items())
    mark = _mark((setup.device.type, setup.precision.name, sorted(installed.sizes)))
    facts = Facts(tokens=run_tokens(setup), saved=saved, warm=mark.exists(), device=setup.device.type,
                  compiler=compiler(), threads=torch.get_num_threads())  # fmt: skip
    if setup.recipe.kernels == "reference":
        wanted = decisions.explicit(NAME, False, "kernels: reference")
    elif asked == "auto":
        wanted = decisions.take(NAME, lambda: choose(facts), usable=lambda value: not value or bool(facts.compiler))
    else:
        wanted = decisions.explicit(NAME, asked)
    if wanted:
        passes = Passes(strict=asked is True, decisions=decisions)
        installed.operations.prefer(list_implementations("compiled", passes.kernels(), _supports))
        setup.undo.callback(passes.leave, mark)
    installed.operations.say_again()  # the run's log begins after the probe
    return wanted


def run_tokens(setup: Setup) -> float | None:
    """Tokens of this process's share of the run, by the mean length of the rows known; None without an end."""
    rows = sampled_rows(setup.train)
    if setup.feed.total is None:
        return None
    share = setup.recipe.global_batch_size / setup.world.size
    return setup.feed.total * share * float(rows.lengths.mean())


def _supports(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Return True if a compiled kernel takes such a tensor. One token alone would need a variant of its own."""
    return dtype in DTYPES and len(shape) > 1 and shape[-2] > 1 and min(shape) > 0


def _mark(variants: object) -> Path:
    """Return a file's path in the compiler's cache that says: a run with these variants of kernels was here."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"
    what = (torch.__version__, torch.get_num_threads(), variants, inspect.getsource(formulas))
    return Path(folder) / f"luthier-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # the user of a container may have no name
        return "none"


class Passes:
    """Compiled kernels of one run. Where compiling fails, eager ones are used and it is logged, or `strict` raises."""

    def __init__(self, *, strict: bool, decisions: Decisions) -> None:
        self.strict, self.decisions = strict, decisions
        self.failed = False
        self._compiled: dict[str, Callable[..., Any]] = {}

    def kernels(self) -> Kernels:
        return Kernels(
            norm=self._norm,
            norm_backward=self._norm_backward,
            turn=self._turn,
            gated=self._gated,
            gated_backward=self._gated_backward,
        )

    def leave(self, mark: Path) -> None:
        """Say on the disk that these kernels are there."""
        if self._compiled and not self.failed and mark.parent.is_dir():
            mark.touch()

    def _norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, form: NormForm
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        dtype = form.dtype or (torch.promote_types(total, weight.dtype) if form.rounded else total)
        given = (x, residual, weight, form.eps, form.offset, form.rounded, dtype)
        return self._run(formulas.compute_norm, given, lambda: kernels.norm_kernel(x, residual, weight, form))

    def _norm_backward(
        self,
        grad: Tensor,
        grad_total: Tensor | None,
        total: Tensor,
        rms: Tensor,
        weight: Tensor,
        form: NormForm,
        wants_weight: bool,
    ) -> tuple[Tensor, Tensor | None]:
        arguments = grad, grad_total, total, rms, weight, form
        given = (grad, grad_total, total, rms, weight, form.offset)
        gradient = self._run(
            formulas.compute_norm_gradient, given, lambda: kernels.norm_gradient_kernel(*arguments, False)[0]
        )
        if not wants_weight:
            return gradient, None
        rest = (grad, total, rms, form.rounded)
        grad_weight = self._run(
            formulas.weight_backward, rest, lambda: kernels.norm_gradient_kernel(*arguments, True)[1]
        )
        return gradient, grad_weight.to(weight.dtype)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        return self._run(formulas.turn_positions, (x, cos, sin, dtype), lambda: kernels.turn_kernel(x, cos, sin, dtype))

    def _gated(self, gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
        formula = formulas.silu_product if kind == "silu" else formulas.gelu_product
        return self._run(formula, (gate, up), lambda: kernels.gated_product(gate, up, kind))

    def _gated_backward(self, grad: Tensor, gate: Tensor, up: Tensor, kind: Gate) -> tuple[Tensor, Tensor]:
        formula = formulas.silu_backward if kind == "silu" else formulas.gelu_backward
        return self._run(formula, (grad, gate, up), lambda: kernels.gated_backward(grad, gate, up, kind))

    def _run(self, formula: Callable[..., Any], given: tuple[Any, ...], eager: Callable[[], Any]) -> Any:
        """Run the compiled formula; the eager kernel if there is none, or if somebody observes torch's operations."""
        tensors = [value for value in given if isinstance(value, Tensor)]
        if self.failed or is_watched() or any(type(t) not in (Tensor, Parameter) for t in tensors):
            return eager()
        from torch._dynamo import maybe_mark_dynamic

        for tensor in tensors:
            if tensor.dim() > 1:
                maybe_mark_dynamic(tensor, 0)  # the number of packed tokens differs from batch to batch
        try:
            return self._made(formula)(*given)
        except _troubles() as error:
            self._give_up(error)
            return eager()

    def _made(self, formula: Callable[..., Any]) -> Callable[..., Any]:
        name = formula.__name__
        if name not in self._compiled:
            compile_formula: Callable[..., Any] = torch.compile  # torch's stubs do not declare a limit for one function
            self._compiled[name] = compile_formula(formula, fullgraph=True, recompile_limit=VARIANTS,
                                                   isolate_recompiles=True)  # fmt: skip
        return self._compiled[name]

    def _give_up(self, error: Exception) -> None:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        if self.strict:
            raise LuthierError("compile-failed", line, where=NAME) from error
        self.failed = True
        self.decisions.explicit(NAME, False, f"compiling failed: {line}")
        log.warning("compiling failed, going on without", error=line)


def is_watched() -> bool:
    """Return True if a mode is on that wants to see each of torch's operations, the compiled ones' inner ones too."""
    return any(not mode.ignore_compile_internals() for mode in _get_current_dispatch_mode_stack())


def _troubles() -> tuple[type[Exception], ...]:
    """Return what torch's compiler raises; a kernel that finds no memory raises something else."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return TorchDynamoException, CppCompileError, InvalidCxxCompiler
