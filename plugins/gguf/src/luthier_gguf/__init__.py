"""What luthier-gguf offers: the exporter `gguf`, described without importing torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import attrs
from luthier import ExporterRecord, hookimpl, option

__version__ = "0.1.0"
__all__ = ["Gguf", "luthier_exporters"]


@attrs.frozen(kw_only=True)
class Gguf:
    """Options of the exporter `gguf`."""

    type: Literal["f16", "q8_0", "q4_0", "tq1_0", "tq2_0"] = option(
        "f16", help="Type of matrices in the file; `tq1_0` and `tq2_0` hold ternary weights exactly."
    )
    fallback: Literal["refuse", "f16", "q8_0"] = option(
        "refuse",
        help="Type of matrices that the chosen type cannot hold (other widths of rows, not ternary), or refuse them.",
    )
    pre_tokenizer: Literal["auto", "gpt-2", "llama-bpe", "qwen2", "smollm"] = option(
        "auto", help="llama.cpp's name of the way in which text is split into words; auto: recognised if it is known."
    )
    max_logit_error: float | None = option(
        None, help="Largest accepted relative difference of logits; none: the bound of the type.", low=0
    )
    modelfile: bool = option(True, help="Also write an Ollama Modelfile.")
    ollama: str | None = option(
        None, help="Also register the export in Ollama under this name, with `ollama create`; none: do not."
    )


@hookimpl
def luthier_exporters() -> Iterable[ExporterRecord]:
    return [
        ExporterRecord(
            name="gguf",
            summary="A GGUF file for llama.cpp and Ollama: F16, Q8_0, Q4_0, or ternary in 1.69 or 2.06 bits.",
            options=Gguf,
            build="luthier_gguf.exporter:GgufExporter",
        )
    ]
