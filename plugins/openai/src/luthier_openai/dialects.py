"""Variants of the wire format by address: how the key is sent, extra fields of requests, notices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import attrs
from luthier import DataRules, TokenPrice

from luthier_openai import OpenAI

DATE: Final = "2025-08-01"  # of the price list
ENDING: Final = (
    "OpenAI ends its self-serve fine-tuning: from 2027-01-06 nobody can create jobs, and tunes of gpt-4o and gpt-4.1 "
    "stop on 2027-01-14 (as known on 2026-11-20)."
)
UNSEEN: Final = "This variant has been tested with a fake only; its own fields are as documented (2026-11-20)."


@attrs.frozen(kw_only=True)
class Dialect:
    """One service's variant of the format. `hosts` are the ends of the addresses that use it."""

    name: str
    hosts: tuple[str, ...] = ()
    key_header: str = "authorization"
    key_prefix: str = "Bearer "
    extra: Mapping[str, Any] = attrs.field(factory=dict)  # extra fields of every job's request
    rules: DataRules = attrs.field(factory=lambda: DataRules(min_rows=10, max_bytes=8_000_000_000, weights=True))
    whole_bytes: int | None = None  # largest file sent in one request; larger ones are sent in parts
    prices: tuple[TokenPrice, ...] = ()
    models: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def _price(model: str, amount: float) -> TokenPrice:
    return TokenPrice(model=model, amount=amount, date=DATE)


DIALECTS: Final = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            name="openai",
            hosts=("api.openai.com",),
            whole_bytes=512_000_000,
            prices=(
                _price("gpt-4.1-mini*", 5.0), _price("gpt-4.1-nano*", 1.5), _price("gpt-4.1*", 25.0),
                _price("gpt-4o-mini*", 3.0), _price("gpt-4o*", 25.0), _price("gpt-3.5-turbo*", 8.0),
            ),
            models=("gpt-4.1-2025-04-14", "gpt-4.1-mini-2025-04-14", "gpt-4.1-nano-2025-04-14", "gpt-4o-2024-08-06",
                    "gpt-4o-mini-2024-07-18"),
            notices=(ENDING,),
        ),
        Dialect(
            name="azure",
            hosts=(".openai.azure.com", ".services.ai.azure.com"),
            key_header="api-key",
            key_prefix="",
            extra={"trainingType": "globalStandard"},
            rules=DataRules(min_rows=10, max_bytes=100_000_000, weights=True),  # larger files break silently
            notices=(UNSEEN,),
        ),
        Dialect(name="compatible", rules=DataRules(weights=True), notices=(UNSEEN,)),
    )
}  # fmt: skip


def choose_dialect(options: OpenAI) -> Dialect:
    """Return the variant that the options name, or that the address uses."""
    if options.dialect != "auto":
        return DIALECTS[options.dialect]
    host = urlsplit(options.base_url).hostname or ""
    fitting = [d for d in DIALECTS.values() if any(host == end or host.endswith(end) for end in d.hosts)]
    return fitting[0] if fitting else DIALECTS["compatible"]
