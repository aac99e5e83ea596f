"""What Bedrock offers, as data with dates: settings and bounds of each model family, rules of files, prices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs
from luthier import Capabilities, DataRules, ServiceRow, SettingRule, TokenPrice

DATE: Final = "2025-08-01"  # of the price list
BYTES: Final = 10**9  # of a training file
RESERVED: Final = (
    "User:",
    "Bot:",
    "Assistant:",
    "System:",
    "<image>",
    "<video>",
    "[EOS]",
)  # jobs fail on rows that contain one
SCHEMA: Final = "bedrock-conversation-2024"
LORA_ONLY: Final = SettingRule(remark="is not sent: the service decides how it trains")
WIRE: Final = {
    "num_train_epochs": "epochCount",
    "global_batch_size": "batchSize",
    "learning_rate": "learningRate",
    "warmup_steps": "learningRateWarmupSteps",
}
WHOLE: Final = ("epochCount", "batchSize", "learningRateWarmupSteps")
INSTEAD: Final = {
    "max_steps": "Set num_train_epochs.",
    "warmup_ratio": "Set warmup_steps, if the model has it.",
    "adapter.r": "The service decides how it trains. Leave the adapter's options out.",
    "loss.beta": "The service trains with sft only.",
}


def _rules(reserved: tuple[str, ...] = ()) -> DataRules:
    return DataRules(max_bytes=BYTES, tools=False, reserved=reserved)


@attrs.frozen(kw_only=True)
class Family:
    """Models that take the same settings. Their identifiers contain `part`."""

    part: str
    settings: Mapping[str, SettingRule]
    rules: DataRules = attrs.field(factory=_rules)
    default_epochs: float | None = None
    multiplier: bool = False  # True: the rate is only scaled


FAMILIES: Final = (  # as documented; the last one is for every other model
    Family(
        part="amazon.nova",
        settings={
            "num_train_epochs": SettingRule(low=1, high=5, whole=True),
            "learning_rate": SettingRule(low=1e-6, high=1e-4),
            "warmup_steps": SettingRule(low=0, high=100, whole=True),
            "adapter.name": LORA_ONLY,
        },
        rules=_rules(RESERVED),
        default_epochs=2.0,
    ),
    Family(
        part="meta.llama",
        settings={
            "num_train_epochs": SettingRule(low=1, high=10, whole=True),
            "learning_rate": SettingRule(low=0.0),
            "global_batch_size": SettingRule(low=1, high=1, whole=True),
            "adapter.name": LORA_ONLY,
        },
        default_epochs=5.0,
    ),
    Family(
        part="anthropic.claude",
        settings={
            "num_train_epochs": SettingRule(low=1, high=10, whole=True),
            "global_batch_size": SettingRule(low=4, high=256, whole=True),
            "adapter.name": LORA_ONLY,
        },
        default_epochs=2.0,
        multiplier=True,
    ),
    Family(
        part="",
        settings={
            "num_train_epochs": SettingRule(low=1, whole=True),
            "learning_rate": SettingRule(low=0.0),
            "global_batch_size": SettingRule(low=1, whole=True),
            "warmup_steps": SettingRule(low=0, whole=True),
            "adapter.name": LORA_ONLY,
        },
    ),
)
PRICES: Final = tuple(
    TokenPrice(model=f"amazon.{name}*", amount=amount, date=DATE)
    for name, amount in (("nova-micro", 1.0), ("nova-lite", 2.0), ("nova-pro", 8.0))
)
MODELS: Final = (  # that can be fine-tuned on text, as AWS's page of 2026 lists them
    *("amazon.nova-2-lite-v1:0:256k", "amazon.nova-micro-v1:0:128k", "amazon.nova-lite-v1:0:300k"),
    *("amazon.nova-pro-v1:0:300k", "anthropic.claude-3-haiku-20240307-v1:0:200k"),
    *("meta.llama3-1-8b-instruct-v1:0:128k", "meta.llama3-1-70b-instruct-v1:0:128k"),
    *("meta.llama3-2-1b-instruct-v1:0:128k", "meta.llama3-2-3b-instruct-v1:0:128k"),
)
UNSEEN: Final = "Bounds of settings (2026-11-20) and prices (2025-08-01) are from AWS's pages. The service decides."


def family_of(model: str) -> Family:
    """Return the family that a model belongs to, by its identifier or its ARN."""
    return next(family for family in FAMILIES if family.part in model)


def describe_offer(model: str) -> Capabilities:
    """Return what the service offers for a model."""
    family = family_of(model)
    instead = {**INSTEAD, **({"learning_rate": "Set provider.learning_rate_multiplier."} if family.multiplier else {})}
    return Capabilities(
        settings=family.settings,
        rules=family.rules,
        prices=PRICES,
        default_epochs=family.default_epochs,
        known_models=MODELS,
        notices=(UNSEEN,),
        instead=instead,
        poll=(15.0, 300.0),
    )


def hyper_parameters(settings: Mapping[str, Any], multiplier: float | None) -> dict[str, str]:
    """Return the settings that the user set, as the service takes them: every value is a text."""
    wire_settings = {wire: settings[name] for name, wire in WIRE.items() if name in settings}
    texts = {name: str(int(value)) if name in WHOLE else repr(float(value)) for name, value in wire_settings.items()}
    return texts if multiplier is None else {**texts, "learningRateMultiplier": repr(multiplier)}


def conversation_row(row: ServiceRow) -> dict[str, Any]:
    """Return a conversation in the service's own format, which keeps the system text apart."""
    system = [{"text": m["content"]} for m in row.messages if m["role"] in ("system", "developer")]
    turns = [
        {"role": m["role"], "content": [{"text": m["content"]}]}
        for m in row.messages
        if m["role"] in ("user", "assistant")
    ]
    return {"schemaVersion": SCHEMA, **({"system": system} if system else {}), "messages": turns}
