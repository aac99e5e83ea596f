"""What Vertex AI offers, as data with dates: settings and bounds, rules of files, states, rows and requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from luthier import Capabilities, DataRules, JobState, ServiceRow, SettingRule, drop_missing

GEMINI: Final = "gemini"  # beginning of the names of models that stay at the service; other models are open
SIZES: Final = {1: "ONE", 2: "TWO", 4: "FOUR", 8: "EIGHT", 16: "SIXTEEN", 32: "THIRTY_TWO"}
MODES: Final = {"lora": "TUNING_MODE_PEFT_ADAPTER", "full": "TUNING_MODE_FULL"}
SPECS: Final = {"sft": "supervisedTuningSpec", "dpo": "preferenceOptimizationSpec"}
COMMON: Final = {
    "num_train_epochs": SettingRule(low=1, whole=True),
    "adapter.r": SettingRule(choices=tuple(SIZES), remark="is sent as adapterSize; which sizes a model takes differs"),
}
TUNED: Final = {  # of Gemini
    **COMMON,
    "adapter.name": SettingRule(choices=("lora",)),
    "loss.beta": SettingRule(low=0.0, methods=("dpo",)),
}
OPEN: Final = {
    **COMMON,
    "adapter.name": SettingRule(choices=tuple(MODES)),
    "learning_rate": SettingRule(low=0.0),
    "global_batch_size": SettingRule(low=1, whole=True),
}
RULES: Final = DataRules(
    max_rows=1_000_000, max_bytes=10**9, max_row_tokens=131_072, max_validation_rows=5_000, tools=False
)
STATES: Final = {  # the service's word after JOB_STATE_ -> our state, and the phase
    "QUEUED": (JobState.PENDING, "queued"),
    "PENDING": (JobState.PENDING, None),
    "PAUSED": (JobState.PENDING, "paused"),
    "RUNNING": (JobState.RUNNING, None),
    "UPDATING": (JobState.RUNNING, "updating"),
    "CANCELLING": (JobState.RUNNING, "canceling"),
    "SUCCEEDED": (JobState.COMPLETED, None),
    "PARTIALLY_SUCCEEDED": (JobState.COMPLETED, "in part"),
    "FAILED": (JobState.FAILED, None),
    "EXPIRED": (JobState.FAILED, "expired"),
    "CANCELLED": (JobState.CANCELED, None),
}
MODELS: Final = ("gemini-3.5-flash", "gemini-3.5-flash-lite", "gemini-3.1-flash-lite")  # as known on 2026-11-20
NOTICE: Final = (
    "Limits of rows and models are from Google's pages (2026-11-20), and differ between models; "
    "no price of today's models is known: give one in prices.json."
)


def is_open(model: str) -> bool:
    """Return True for a model whose weights can be downloaded."""
    return not model.rpartition("/")[2].startswith(GEMINI)


def describe_offer(model: str) -> Capabilities:
    """Return what the service offers for a model."""
    opened = is_open(model)
    scaled = (
        {}
        if opened
        else {"learning_rate": "The service only scales its own rate. Set provider.learning_rate_multiplier."}
    )
    return Capabilities(
        methods=("sft",) if opened else tuple(SPECS),
        settings=OPEN if opened else TUNED,
        rules=RULES,
        weights=("adapter", "model") if opened else (),
        known_models=MODELS,
        notices=(NOTICE,),
        instead={"max_steps": "Set num_train_epochs.", **scaled},
        poll=(15.0, 300.0),
    )


def hyper_parameters(settings: Mapping[str, Any], multiplier: float | None) -> dict[str, Any]:
    """Return the settings that the user set, as the service takes them: whole numbers are texts."""
    rank = settings.get("adapter.r")
    return drop_missing(
        epochCount=_whole(settings.get("num_train_epochs")),
        adapterSize=None if rank is None else f"ADAPTER_SIZE_{SIZES[int(rank)]}",
        beta=settings.get("loss.beta"),
        learningRate=settings.get("learning_rate"),
        batchSize=_whole(settings.get("global_batch_size")),
        learningRateMultiplier=multiplier,
    )


def _whole(value: float | None) -> str | None:
    return None if value is None else str(int(value))


def gemini_row(row: ServiceRow) -> dict[str, Any]:
    """Return a row in the service's own format: a conversation, or a pair with a score of 1 for the better."""
    system = [{"text": m["content"]} for m in row.messages if m["role"] in ("system", "developer")]
    contents = _contents(row.messages)
    if not row.chosen:
        return {**({"systemInstruction": {"role": "system", "parts": system}} if system else {}), "contents": contents}
    sides = ((1, row.chosen), (0, row.rejected))
    return {
        **({"system_instruction": {"parts": system}} if system else {}),
        "contents": contents,
        "completions": [{"score": score, "completion": _contents(side)[-1]} for score, side in sides],
    }


def _contents(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    roles = {"user": "user", "assistant": "model"}
    return [{"role": roles[m["role"]], "parts": [{"text": m["content"]}]} for m in messages if m["role"] in roles]
