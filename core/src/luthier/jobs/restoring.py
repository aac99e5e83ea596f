"""Providers: made from a name and options, and made again for a job from what the store keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs

from luthier.errors import LuthierError
from luthier.jobs.secret import SOURCES, Secret, hold_secret, is_held_secret
from luthier.plugins.providing.job_records import Job
from luthier.plugins.providing.provider_protocol import Provider
from luthier.plugins.registry import installed_plugins
from luthier.recipe.parts import find_part, plain_options

KEYS: Final = ("api_key", "token")  # options that name the source of a key


@attrs.frozen(kw_only=True, eq=False)
class ReadyProvider:
    """A provider with the name and plain options from which it can be made again; both are None for an object."""

    part: Provider
    name: str
    options: dict[str, Any] | None


_MADE: dict[int, ReadyProvider] = {}


def provider(name: str, **options: Any) -> Provider:
    """Return a ready provider. A key passed as text becomes a `Secret` at once, and is never written down."""
    ready = make_provider({"name": name, **options})
    _MADE[id(ready.part)] = ready
    return ready.part


def make_provider(value: Any) -> ReadyProvider:
    """Return the provider that a name, a mapping, an options object, or a provider itself stands for."""
    if id(value) in _MADE:
        return _MADE[id(value)]
    if isinstance(value, Mapping):
        value = {k: _hidden(k, v) for k, v in value.items()}
    plugins = installed_plugins()
    part = find_part(value, "provider", "provider", plugins)
    if part.offer is None:
        return ReadyProvider(part=part.local, name=part.name, options=None)
    built = plugins.build(part.offer, part.options)
    return ReadyProvider(part=built, name=part.name, options=plain_options(part.options))


def restore_provider(job: Job) -> ReadyProvider:
    """Return the provider of a stored job. Raises `job-elsewhere` if it now uses another account or address."""
    spec = job.spec
    options = {
        k: v
        for k, v in spec.options.items()
        if not (k in KEYS and str(v).startswith("held:") and not is_held_secret(str(v)))
    }
    ready = make_provider({"name": spec.provider, **options})
    scope = ready.part.scope()
    if scope != spec.scope:
        raise LuthierError("job-elsewhere", f"it was submitted to {spec.scope}, and {spec.provider} is now {scope}",
                           where=job.id)  # fmt: skip
    return ready


def _hidden(name: str, value: Any) -> Any:
    if isinstance(value, Secret) or (name in KEYS and isinstance(value, str) and not value.startswith(SOURCES)):
        return hold_secret(value)
    return value
