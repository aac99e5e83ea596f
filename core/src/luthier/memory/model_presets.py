"""Model presets: the config numbers of well-known open models, and the memory that rehearsals predicted for them.

`python -m luthier.memory.model_presets` rehearses all of them again and writes the file anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

FILE: Final = Path(__file__).with_suffix(".json")
DOCUMENT: Final = 2048  # tokens of the documents in the rehearsals
POINTS: Final = (2048, 8192)  # tokens of the rehearsed micro-batches; memory is linear between and beyond them
LORA: Final = {"name": "lora", "r": 16, "target_modules": "all-linear"}
FULL: Final = {"adapter": "full", "model.dtype": "float32", "precision": "bf16"}
ADAPTED: Final = {"adapter": LORA, "model.dtype": "bfloat16", "precision": "bf16"}
METHODS: Final[dict[str, dict[str, Any]]] = {  # recipe settings
    "full": FULL,
    "full, recomputed": {**FULL, "gradient_checkpointing": True},
    "lora": ADAPTED,
    "lora, recomputed": {**ADAPTED, "gradient_checkpointing": True},
}


@attrs.frozen(kw_only=True)
class Preset:
    """One model. `memory` has for each of METHODS the bytes at rest, and those for each token of a micro-batch."""

    name: str
    license: str
    parameters: int
    config: Mapping[str, Any]  # with the names of its transformers config
    memory: Mapping[str, tuple[float, float]]

    def needs(self, method: str, tokens: int) -> int:
        """Return the bytes at the predicted peak of steps whose micro-batches have `tokens` tokens."""
        fixed, each = self.memory[method]
        return round(fixed + each * tokens)


def list_presets() -> list[Preset]:
    """Return all presets, the smallest model first."""
    known = json.loads(FILE.read_text("utf-8"))
    return sorted((Preset(name=name, **entry) for name, entry in known.items()), key=lambda p: p.parameters)


def measure(config: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[float, float]:
    """Return the bytes at rest and for each token, from rehearsals of two sizes of micro-batch, two of them in each
    step.
    """
    import torch
    import transformers

    from luthier.data.stream.row_stream import sampled_rows
    from luthier.memory.dry_run import Rehearsal, stand_in
    from luthier.recipe import load_recipe, resolve_parts
    from luthier.recipe.rowless import NO_ROWS
    from luthier.recipe.settled import settle_recipe

    given = {"model": "preset", "data": NO_ROWS, "device": "cpu", "callbacks": [], **settings}
    recipe = load_recipe({}, given).recipe
    rows = stand_in(recipe, DOCUMENT)
    shape = transformers.AutoConfig.for_model(**config)
    settled = settle_recipe(recipe, {}, packing=recipe.packing)
    rehearsal = Rehearsal(settled, resolve_parts(recipe), torch.device("cpu"), prepared=rows, config=shape)
    low, high = POINTS
    peaks = [rehearsal.footprint([[sampled_rows(rows.train)[0]] * (n // DOCUMENT)] * 2).peak for n in POINTS]
    each = (peaks[1] - peaks[0]) / (high - low)
    return peaks[0] - each * low, each


def count(config: Mapping[str, Any]) -> int:
    """Parameters of a config, shared ones once."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    return sum(parameter.numel() for parameter in model.parameters())


def renew(names: Iterable[str] = ()) -> None:
    """Rehearse these presets, or all, and write the file."""
    known, wanted = json.loads(FILE.read_text("utf-8")), set(names)
    for name, entry in known.items():
        if wanted and name not in wanted:
            continue
        memory = {method: measure(entry["config"], settings) for method, settings in METHODS.items()}
        entry.update(parameters=count(entry["config"]), memory=memory)
        print(name, {method: f"{(a + 4096 * b) / 2**30:.1f} GiB" for method, (a, b) in memory.items()}, flush=True)
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in known.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    import sys

    renew(sys.argv[1:])
