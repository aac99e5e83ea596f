"""What Fireworks offers, as data with dates: settings and bounds, rules of files, prices, states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from luthier import Capabilities, DataRules, JobState, SettingRule, TokenPrice, drop_missing

SETTINGS: Final = {
    "num_train_epochs": SettingRule(low=1, whole=True),
    "learning_rate": SettingRule(low=0.0),
    "warmup_steps": SettingRule(low=0, whole=True),
    "global_batch_size": SettingRule(
        low=1, whole=True, remark="is sent as batchSizeSamples, the rows of one step; the service packs them"
    ),
    "optimizer.weight_decay": SettingRule(low=0.0),
    "data.max_length": SettingRule(low=1, whole=True),
    "adapter.name": SettingRule(choices=("lora",)),
    "adapter.r": SettingRule(low=1, whole=True),
    "loss.beta": SettingRule(low=0.0, high=0.5, methods=("dpo",)),
}
WIRE: Final = {
    "num_train_epochs": "epochs",
    "learning_rate": "learningRate",
    "warmup_steps": "learningRateWarmupSteps",
    "global_batch_size": "batchSizeSamples",
    "optimizer.weight_decay": "optimizerWeightDecay",
    "data.max_length": "maxContextLength",
    "adapter.r": "loraRank",
}
WHOLE: Final = ("epochs", "learningRateWarmupSteps", "batchSizeSamples", "maxContextLength", "loraRank")
COLLECTIONS: Final = {  # loss -> the path of its jobs, and the parameter that names a new one
    "sft": ("supervisedFineTuningJobs", "supervisedFineTuningJobId"),
    "dpo": ("dpoJobs", "dpoJobId"),
    "orpo": ("dpoJobs", "dpoJobId"),
}
STATES: Final = {  # the service's word after JOB_STATE_ -> our state, and the phase
    "CREATING": (JobState.PENDING, None),
    "PENDING": (JobState.PENDING, "queued"),
    "VALIDATING": (JobState.PENDING, "validating"),
    "CREATING_INPUT_DATASET": (JobState.PENDING, "validating"),
    "RE_QUEUEING": (JobState.PENDING, "queued"),
    "PAUSED": (JobState.PENDING, "paused"),
    "IDLE": (JobState.PENDING, "idle"),
    "RUNNING": (JobState.RUNNING, "training"),
    "WRITING_RESULTS": (JobState.RUNNING, "saving"),
    "CANCELLING": (JobState.RUNNING, "canceling"),
    "COMPLETED": (JobState.COMPLETED, None),
    "EARLY_STOPPED": (JobState.COMPLETED, "stopped early"),
    "FAILED": (JobState.FAILED, None),
    "EXPIRED": (JobState.FAILED, "expired"),
    "CANCELLED": (JobState.CANCELED, None),
    "DELETING": (JobState.CANCELED, "being deleted"),
    "DELETING_CLEANING_UP": (JobState.CANCELED, "being deleted"),
}
DATE: Final = "2025-08-01"  # of the price list, which goes by the size in the model's name and has no price of DPO
SIZES: Final = (
    (("*-1b*", "*-3b*", "*-4b*", "*-7b*", "*-8b*", "*-14b*"), 0.5),
    (("*-27b*", "*-31b*", "*-32b*", "*-70b*", "*-72b*"), 3.0),
)
MODELS: Final = tuple(  # models for every method, as the service's page of 2026 lists them
    f"accounts/fireworks/models/{name}" for name in ("gemma-4-26b-a4b-it", "gemma-4-31b-it", "glm-5p1", "kimi-k2p5")
)


def describe_offer() -> Capabilities:
    """Return what the service offers for any model."""
    prices = (
        TokenPrice(model=pattern, amount=amount, date=DATE, method="sft", adapter="lora")
        for patterns, amount in SIZES
        for pattern in patterns
    )
    return Capabilities(
        methods=tuple(COLLECTIONS),
        settings=SETTINGS,
        rules=DataRules(min_rows=3, max_rows=3_000_000, weights=True, tools=True),
        weights=("adapter",),
        prices=tuple(prices),
        known_models=MODELS,
        instead={
            "max_steps": "Set num_train_epochs.",
            "warmup_ratio": "Set warmup_steps.",
            "adapter.lora_alpha": "The service chooses it by the rank. Set only adapter.r.",
        },
    )


def training_fields(model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the request's fields for the settings that the user set."""
    fields = {wire: settings[name] for name, wire in WIRE.items() if name in settings}
    return {"baseModel": model, **{name: int(v) if name in WHOLE else v for name, v in fields.items()}}


def loss_fields(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the loss of a preference job. It is always named, because the documented defaults disagree."""
    beta = settings.get("loss.beta")
    return drop_missing(method=method.upper(), dpo=None if beta is None else {"beta": beta})
