"""`luthier presets`: well-known models, the memory that training them takes, and which training fits here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from luthier.cli.screen.answers import Answer
from luthier.cli.screen.flags import Json
from luthier.errors import LuthierError, suggest_nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

GIB: Final = 2**30


def presets(
    name: Annotated[str | None, typer.Argument(help="Only models with this in their name.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of one micro-batch.", min=1)] = 4096,
    memory: Annotated[
        float | None, typer.Option(help="GiB of another device to compare with.", min=0.0, show_default="this one's")
    ] = None,
    json: Json = False,
) -> Any:
    """List well-known models with the memory that training takes."""
    from luthier.memory.model_presets import METHODS
    from luthier.memory.model_presets import list_presets as known

    chosen = [p for p in known() if name is None or name.lower() in p.name.lower()]
    if not chosen:
        hint = suggest_nearest(name or "", [p.name for p in known()])
        raise LuthierError("usage", "no preset has this in its name", where="NAME", found=name, remedy=hint)
    room = _room() if memory is None else {"device": "the device", "free": int(memory * GIB)}
    rows = [_row(preset, tokens, room) for preset in chosen]
    document = {"tokens": tokens, "device": room, "methods": METHODS, "presets": rows}
    return Answer(document=document, view=lambda screen: _draw(screen, document))


def _row(preset: Any, tokens: int, room: Mapping[str, Any] | None) -> dict[str, Any]:
    needs = {method: preset.needs(method, tokens) for method in preset.memory}
    fits = None if room is None else {method: size <= room["free"] for method, size in needs.items()}
    row = {"name": preset.name, "license": preset.license, "parameters": preset.parameters}
    return {**row, "config": preset.config, "memory": needs, "fits": fits}


def _room() -> dict[str, Any] | None:
    """Return the free memory of the best device here; None if torch, which finds devices, is not installed."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        return None
    from luthier.hardware.devices import choose_device
    from luthier.hardware.free_memory import measure_capacity

    capacity = measure_capacity(choose_device("auto"))
    return {"device": capacity.device, "free": capacity.free}


def _draw(screen: Console, document: Mapping[str, Any]) -> None:
    from rich.text import Text

    from luthier.cli.screen.tables import draw_fitted
    from luthier.sizes import size_text

    methods, room = list(document["methods"]), document["device"]
    rows: list[list[str | Text]] = [["model", ">size", *(f">{name.replace('recomputed', 'rc')}" for name in methods)]]
    rows += [[row["name"], _counted(row["parameters"]), *_cells(row, methods)] for row in document["presets"]]
    title = f"Predicted memory in GiB, at {document['tokens']:,} tokens a micro-batch"
    screen.print(Text(title, style="bold underline"))
    draw_fitted(screen, rows, ["size"])
    screen.print()
    if room is not None:
        screen.print(f"* fits the {size_text(room['free'])} that are free on {room['device']}", highlight=False)
    screen.print("full: float32 weights, bfloat16 products, AdamW; lora: bfloat16 weights, r 16 on every linear layer",
                 highlight=False)  # fmt: skip
    screen.print(
        "rc: recomputed, with gradient_checkpointing. `luthier plan` predicts your own recipe.", highlight=False
    )


def _cells(row: Mapping[str, Any], methods: Sequence[str]) -> list[str]:
    fits = row["fits"] or {}
    return [f"{row['memory'][m] / GIB:,.1f}{' *' if fits.get(m) else '  '}" for m in methods]


def _counted(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
