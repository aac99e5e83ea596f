"""Jobs at a service on Anyscale. The options set up the core's client for OpenAI's wire format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Final

from luthier import (
    Capabilities,
    DataRules,
    Finding,
    Secret,
    SettingRule,
    WireService,
    WireTerms,
    read_secret,
)

from luthier_anyscale import Anyscale

OFFER: Final = Capabilities(
    settings={
        "num_train_epochs": SettingRule(low=1, whole=True),
        "seed": SettingRule(low=0, whole=True),
        "adapter.name": SettingRule(remark="is not sent: the service decides how it trains"),
    },
    rules=DataRules(tools=True),
    notices=(
        "Anyscale's public fine-tuning ended on 2024-08-01. This provider talks to a service of your own, with the "
        "fields "
        "of the public one (as of 2026-11-20). It has been tested with a fake only.",
    ),
    instead={
        "max_steps": "Set num_train_epochs.",
        "learning_rate": "The service decides it. Set it there.",
        "adapter.r": "The service decides it. Set it there.",
    },
)
NO_ADDRESS: Final = Finding(
    level="error", rule="setting", where="provider.base_url", message="the address of your own service must be given"
)


def build_service(options: Anyscale) -> WireService:
    """Return the provider. It reads no key before the first request."""
    address = (options.base_url or "").rstrip("/")
    return WireService(
        WireTerms(
            service="anyscale",
            base_url=address,
            headers=_headers_of(options),
            capabilities=OFFER,
            scope=address,
            dialect="anyscale",
            suffix=options.suffix,
            findings=() if address else (NO_ADDRESS,),
        )
    )


def _headers_of(options: Anyscale) -> Callable[[], Mapping[str, str | Secret]]:
    @cache
    def headers() -> Mapping[str, str | Secret]:
        return {"authorization": read_secret(options.api_key, "anyscale.api_key").with_prefix("Bearer ")}

    return headers
