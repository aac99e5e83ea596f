"""What Together offers, as data with dates: settings and bounds, rules of files, prices, states."""

from __future__ import annotations

from typing import Any, Final

from luthier import Capabilities, DataRules, JobState, SettingRule, TokenPrice

SETTINGS: Final = {
    "num_train_epochs": SettingRule(low=1, whole=True),
    "global_batch_size": SettingRule(low=1, whole=True, remark="packing at the service changes what a batch holds"),
    "learning_rate": SettingRule(low=0.0),
    "lr_scheduler_type": SettingRule(choices=("linear", "cosine")),
    "warmup_ratio": SettingRule(low=0.0, high=1.0),
    "max_grad_norm": SettingRule(low=0.0),
    "optimizer.weight_decay": SettingRule(low=0.0),
    "seed": SettingRule(low=0, whole=True),
    "packing": SettingRule(),
    "data.max_length": SettingRule(low=1, whole=True),
    "data.train_on": SettingRule(choices=("assistant", "all"), methods=("sft",)),
    "adapter.name": SettingRule(choices=("lora", "full")),
    "adapter.r": SettingRule(low=1, whole=True),
    "adapter.lora_alpha": SettingRule(low=1, whole=True),
    "adapter.lora_dropout": SettingRule(low=0.0, high=0.99),
    "adapter.target_modules": SettingRule(),
    "loss.beta": SettingRule(low=0.0, methods=("dpo",)),
}
WIRE: Final = {  # settings at the top level of a request, under other names
    "num_train_epochs": "n_epochs",
    "global_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "warmup_ratio": "warmup_ratio",
    "max_grad_norm": "max_grad_norm",
    "optimizer.weight_decay": "weight_decay",
    "seed": "random_seed",
    "packing": "packing",
    "data.max_length": "max_seq_length",
}
PUT_BYTES: Final = 5 * 2**30  # largest PUT to storage; larger files need parts, which this provider does not send
STATES: Final = {  # the service's word -> our state, and the phase
    "pending": (JobState.PENDING, None),
    "queued": (JobState.PENDING, "queued"),
    "running": (JobState.RUNNING, "training"),
    "compressing": (JobState.RUNNING, "saving"),
    "uploading": (JobState.RUNNING, "saving"),
    "cancel_requested": (JobState.RUNNING, "canceling"),
    "completed": (JobState.COMPLETED, None),
    "error": (JobState.FAILED, None),
    "cancelled": (JobState.CANCELED, None),
}
DATE: Final = "2025-08-01"  # of the price list, by the size in the model's name
SIZES: Final = (  # of models up to so many billion parameters: SFT with LoRA, SFT, DPO with LoRA, DPO
    (("*-1b*", "*-3b*", "*-7b*", "*-8b*", "*-9b*", "*-12b*", "*-14b*"), (0.48, 0.54, 1.20, 1.35)),
    (("*-27b*", "*-32b*", "*-34b*"), (1.50, 1.65, 3.75, 4.12)),
    (("*-70b*", "*-72b*"), (2.90, 3.20, 7.25, 8.00)),
)
KINDS: Final = (("sft", "lora"), ("sft", "full"), ("dpo", "lora"), ("dpo", "full"))


def known_prices() -> tuple[TokenPrice, ...]:
    """Return the prices for a million tokens, by the pattern of the model's name."""
    return tuple(
        TokenPrice(model=pattern, amount=amount, date=DATE, method=method, adapter=adapter)
        for patterns, amounts in SIZES
        for pattern in patterns
        for (method, adapter), amount in zip(KINDS, amounts, strict=True)
    )


def describe_offer() -> Capabilities:
    """Return what the service offers for any model. The service reports without cost what it refuses."""
    return Capabilities(
        methods=("sft", "dpo"),
        settings=SETTINGS,
        rules=DataRules(forms=("conversation", "completion", "text"), max_bytes=PUT_BYTES, weights=True, tools=True),
        weights=("adapter", "model"),
        prices=known_prices(),
        default_epochs=1.0,
        instead={"max_steps": "Set num_train_epochs.", "warmup_steps": "Set warmup_ratio."},
    )


def request_body(model: str, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the request's fields for the settings that the user set."""
    body: dict[str, Any] = {"model": model}
    body |= {wire: settings[name] for name, wire in WIRE.items() if name in settings}
    if "n_epochs" in body:
        body["n_epochs"] = int(body["n_epochs"])
    if "lr_scheduler_type" in settings:
        body["lr_scheduler"] = {"lr_scheduler_type": settings["lr_scheduler_type"]}
    training_type = _training_type(settings)
    if training_type is not None:
        body["training_type"] = training_type
    body["training_method"] = _training_method(method, settings)
    return body


def _training_type(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return LoRA or full training, or None if the recipe does not say and the service chooses."""
    if settings.get("adapter.name") == "full":
        return {"type": "Full"}
    names = {"adapter.r": "lora_r", "adapter.lora_alpha": "lora_alpha", "adapter.lora_dropout": "lora_dropout"}
    body = {wire: settings[name] for name, wire in names.items() if name in settings}
    modules = settings.get("adapter.target_modules")
    if modules is not None:
        body["lora_trainable_modules"] = modules if isinstance(modules, str) else ",".join(modules)
    if not body and "adapter.name" not in settings:
        return None
    rank = body.get("lora_r", 16)
    return {"type": "Lora", "lora_r": rank, "lora_alpha": 2 * rank, **body}


def _training_method(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    if method == "dpo":
        beta = settings.get("loss.beta")
        return {"method": "dpo", **({} if beta is None else {"dpo_beta": beta})}
    inputs = {"all": True, "assistant": False}.get(settings.get("data.train_on", ""), "auto")
    return {"method": "sft", "train_on_inputs": inputs}
