"""A small task that is here: sums of one digit, so that the benchmark can be tried without a network."""

from __future__ import annotations

from typing import Any, Final

from luthier_lm_eval import SAMPLE

ROWS: Final = [{"question": f"What is {a} plus {b}?", "choices": [f"{a + b}", f"{a + b + 1}", f"{a + b + 2}"]}
               for a in range(1, 5) for b in range(1, 4)]  # fmt: skip


def sample_rows(**metadata: Any) -> dict[str, Any]:
    """Return the rows by split, as the harness takes them from a function; the first choice is the right one."""
    from datasets import Dataset

    return {"test": Dataset.from_list(ROWS)}


SAMPLE_TASK: Final[dict[str, Any]] = {
    "task": SAMPLE,
    "custom_dataset": sample_rows,
    "output_type": "multiple_choice",
    "test_split": "test",
    "fewshot_split": "test",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_choice": "choices",
    "doc_to_target": 0,
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
