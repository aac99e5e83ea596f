"""What luthier-lora offers: the adapters `lora`, `dora` and `adalora`, described without importing torch."""

from __future__ import annotations

from pathlib import Path

from luthier import AdapterRecord, hookimpl

from luthier_lora.options import AdaLora, Dora, Lora

__all__ = ["AdaLora", "Dora", "Lora", "luthier_adapters", "options_of"]


def options_of(folder: str | Path) -> Lora | Dora | AdaLora:
    """Return the options with which the adapter in this folder, ours or PEFT's, can be attached and loaded."""
    from luthier_lora.files import read_options

    return read_options(Path(folder))


@hookimpl
def luthier_adapters() -> list[AdapterRecord]:
    build = "luthier_lora.adapter:LoraAdapter"
    tags = ("reference", "trainable-weights")
    return [
        AdapterRecord(
            name="lora",
            summary="Low-rank updates of frozen layers (LoRA, rsLoRA), in PEFT's files.",
            options=Lora,
            build=build,
            provides=tags,
        ),
        AdapterRecord(
            name="dora",
            summary="LoRA with a separately trained magnitude for each output row (DoRA), in PEFT's files.",
            options=Dora,
            build=build,
            provides=tags,
        ),
        AdapterRecord(
            name="adalora",
            summary="LoRA whose ranks move to the layers that need them, within a budget (AdaLoRA), in PEFT's files.",
            options=AdaLora,
            build="luthier_lora.adalora:AdaLoraAdapter",
            provides=tags,
        ),
    ]
