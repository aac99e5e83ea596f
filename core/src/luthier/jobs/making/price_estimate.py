"""The estimated cost of a job, from a dated table of prices that the user can override."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from luthier.errors import LuthierError
from luthier.plugins.providing.job_records import Capabilities, CostEstimate, JobSpec, TokenPrice
from luthier.plugins.structure import structure_value

OVERRIDES: Final = "prices.json"  # in the store's folder: {provider: [{model, amount, date, ...}]}


def estimate_cost(job: JobSpec, capabilities: Capabilities, own: Sequence[TokenPrice] = ()) -> CostEstimate:
    """Return the cost of training on the job's tokens. The user's `own` prices precede the provider's table."""
    training = job.files.get("training")
    if training is None or training.tokens is None:
        return CostEstimate(amount=None, basis="the number of tokens is unknown")
    epochs = job.settings.get("num_train_epochs", capabilities.default_epochs)
    adapter = str(job.settings.get("adapter.name", "lora"))
    if epochs is None:
        basis = "the service chooses the number of epochs: set num_train_epochs for an estimate"
        return CostEstimate(amount=None, tokens=training.tokens, basis=basis)
    tokens = round(training.tokens * float(epochs))
    price = next((p for p in (*own, *capabilities.prices) if _fits(p, job, adapter)), None)
    if price is None:
        return CostEstimate(amount=None, tokens=tokens, basis=f"no price is known for {job.model}")
    amount = max(price.minimum, tokens * price.amount / 1e6)
    basis = f"{price.amount:g} {price.currency} for a million tokens, price list of {price.date}"
    return CostEstimate(amount=round(amount, 6), currency=price.currency, tokens=tokens, basis=basis,
                        exact_tokens=training.exact_tokens)  # fmt: skip


def read_own_prices(folder: Path, provider: str) -> list[TokenPrice]:
    """Return a provider's prices in the user's own file; an empty list if there is no file. Raises `recipe-syntax`."""
    path = folder / OVERRIDES
    if not path.exists():
        return []
    try:
        table = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LuthierError("recipe-syntax", f"cannot be read: {error}", where=str(path)) from None
    return structure_value(table.get(provider, []) if isinstance(table, dict) else table, list[TokenPrice], str(path))


def check_cost(estimate: CostEstimate, max_cost: float | None) -> None:
    """Raise `cost-above` if a job may cost more than `max_cost`, or if its cost is not known."""
    if max_cost is None:
        return
    if estimate.amount is None:
        raise LuthierError("cost-above", f"max_cost {max_cost:g} cannot be checked: {estimate.basis}", where="max_cost",
                           remedy=f"Give prices in {OVERRIDES} of the jobs' folder.")  # fmt: skip
    if estimate.amount > max_cost:
        problem = (
            f"about {estimate.amount:g} {estimate.currency} ({estimate.basis}), and at most {max_cost:g} is allowed"
        )
        raise LuthierError("cost-above", problem, where="max_cost")


def _fits(price: TokenPrice, job: JobSpec, adapter: str) -> bool:
    return (
        fnmatch(job.model.lower(), price.model.lower())
        and price.method in (None, job.method)
        and price.adapter in (None, adapter)
    )
