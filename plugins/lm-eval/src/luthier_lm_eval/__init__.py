"""What luthier-lm-eval offers: the benchmark `lm_eval`, described without importing the harness."""

from __future__ import annotations

from typing import Final

import attrs
from luthier import BenchmarkRecord, hookimpl, option

__all__ = ["LmEval", "luthier_benchmarks"]

SAMPLE: Final = "luthier_sums"  # a task that is here, for a trial without a network


@attrs.frozen(kw_only=True)
class LmEval:
    """Options of the benchmark `lm_eval`, under the names of the harness."""

    include_path: str | None = option(None, help="A folder of tasks of your own, as YAML files; none: the harness's.")
    limit: int | None = option(None, help="Examples of each task; none: all.", low=1)
    num_fewshot: int | None = option(None, help="Solved examples before each question; none: the task's own.", low=0)
    apply_chat_template: bool = option(False, help="Put each prompt into the model's chat template.")
    system_instruction: str | None = option(None, help="A text before each prompt; none: nothing.")
    bootstrap_iters: int = option(100000, help="Resamples for errors of metrics that are no mean; 0: none.", low=0)
    confirm_run_unsafe_code: bool = option(False, help="Run tasks that execute code which the model writes.")


@hookimpl
def luthier_benchmarks() -> list[BenchmarkRecord]:
    return [
        BenchmarkRecord(
            name="lm_eval",
            summary="The tasks of EleutherAI's lm-evaluation-harness, and tasks of your own as its YAML files.",
            options=LmEval,
            build="luthier_lm_eval.harness:Harness",
            sample=SAMPLE,
        )
    ]
