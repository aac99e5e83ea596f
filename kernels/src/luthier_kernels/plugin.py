"""The plugin: faster forms of the engine's operations, used when this package is installed (`kernels: auto`)."""

from __future__ import annotations

from collections.abc import Iterable

from luthier import OperationRecord, hookimpl

OFFERED = "luthier_kernels.offered"
ROUNDED_LOGITS = 2**-7  # rounding of bfloat16 products in a float32 result; the engine's own head has it too
FORMS = (
    ("rms_norm", "build_norm", "takes_rows", "RMSNorm in one pass, C or Triton."),
    ("add_rms_norm", "build_sum_norm", "takes_rows", "The sum of the residual stream and its RMSNorm in one pass."),
    ("rope", "build_rotation", "takes_rows", "Rotary positions in one pass, C or Triton."),
    ("swiglu", "build_swiglu", "takes_swiglu", "SwiGLU in one pass each way, C or Triton."),
    ("geglu", "build_geglu", "takes_geglu", "GeGLU in one pass each way, in Triton."),
    ("token_logprobs", "build_head", "takes_head", "A frozen head's log-probabilities and their gradient in one pass."),
    ("document_attention", "build_attention", "takes_attention", "Attention in blocks that stay in the cache, in C."),
)


@hookimpl
def luthier_operations() -> Iterable[OperationRecord]:
    return [
        OperationRecord(
            name=f"kernels.{operation}",
            summary=summary,
            operation=operation,
            build=f"{OFFERED}:{build}",
            predicate=f"{OFFERED}:{predicate}",
            tolerance=ROUNDED_LOGITS if operation == "token_logprobs" else 1e-5,
        )
        for operation, build, predicate, summary in FORMS
    ]
