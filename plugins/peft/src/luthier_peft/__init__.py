"""What luthier-peft offers: an adapter `peft.<method>` for each method of the installed PEFT that changes layers."""

from __future__ import annotations

from typing import Any

from luthier import AdapterRecord, hookimpl

from luthier_peft.listing import config_names
from luthier_peft.methods import offered


@hookimpl
def luthier_adapters() -> list[AdapterRecord]:
    return [
        AdapterRecord(
            name=f"peft.{name}",
            summary=method.summary,
            options="luthier_peft.options:options_for",
            build="luthier_peft.adapter:build",
            needs="dense-weights",
            provides=("reference", "trainable-weights"),
            conflicts=("quantized-base", "packing") if method.packing else ("quantized-base",),
            mergeable=method.mergeable,
            tolerance=method.tolerance,
        )
        for name, method in offered().items()
    ]


def __getattr__(name: str) -> Any:
    """Return an options class by the name of PEFT's config: `luthier_peft.LoHaConfig(r=4)` is `peft.loha`."""
    if not name.endswith("Config") or name not in config_names().values():
        raise AttributeError(f"module 'luthier_peft' has no attribute {name!r}")
    from luthier_peft import options

    return getattr(options, name)
