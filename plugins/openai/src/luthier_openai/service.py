"""Jobs at OpenAI and services of its format. The options set up the core's client for that format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Final

from luthier import Capabilities, Secret, SettingRule, WireService, WireTerms, read_secret

from luthier_openai import OpenAI
from luthier_openai.dialects import Dialect, choose_dialect

SETTINGS: Final = {
    "num_train_epochs": SettingRule(low=1, high=50, whole=True),
    "global_batch_size": SettingRule(low=1, high=256, whole=True),
    "seed": SettingRule(low=0, whole=True),
    "loss.beta": SettingRule(low=0.0, high=2.0, methods=("dpo",)),
    "adapter.name": SettingRule(remark="is not sent: the service decides how it trains"),
}
INSTEAD: Final = {
    "learning_rate": "The service only scales its own rate. Set provider.learning_rate_multiplier.",
    "max_steps": "Set num_train_epochs.",
    "adapter.r": "The service decides how it trains. Leave the adapter's options out.",
}


def build_service(options: OpenAI) -> WireService:
    """Return the provider. It reads no key before the first request."""
    dialect = choose_dialect(options)
    account = "/".join(filter(None, (options.organization, options.project)))
    address = options.base_url.rstrip("/")
    return WireService(
        WireTerms(
            service="openai",
            base_url=options.base_url,
            headers=_headers_of(options, dialect),
            capabilities=_describe_offer(dialect),
            scope=f"{address}#{account}" if account else address,
            dialect=dialect.name,
            params={"api-version": options.api_version} if options.api_version else {},
            extra=dialect.extra,
            hyperparameters={"learning_rate_multiplier": options.learning_rate_multiplier},
            suffix=options.suffix,
            whole_bytes=dialect.whole_bytes,
        )
    )


def _describe_offer(dialect: Dialect) -> Capabilities:
    return Capabilities(
        methods=("sft", "dpo"),
        settings=SETTINGS,
        rules=dialect.rules,
        prices=dialect.prices,
        known_models=dialect.models,
        notices=dialect.notices,
        instead=INSTEAD,
    )


def _headers_of(options: OpenAI, dialect: Dialect) -> Callable[[], Mapping[str, str | Secret]]:
    @cache
    def key() -> Secret:
        return read_secret(options.api_key, "openai.api_key")

    def headers() -> dict[str, str | Secret]:
        account = {"openai-organization": options.organization, "openai-project": options.project}
        named = {name: value for name, value in account.items() if value}
        return {dialect.key_header: key().with_prefix(dialect.key_prefix), **named}

    return headers
