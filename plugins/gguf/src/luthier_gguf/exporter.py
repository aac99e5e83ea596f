"""The exporter `gguf`: a file with weights, sizes, tokenizer and template, and a Modelfile for Ollama."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from luthier import LuthierError, get_logger

from luthier_gguf import Gguf
from luthier_gguf.architectures import find_architecture
from luthier_gguf.comparison import compare_file
from luthier_gguf.modelfile import write_modelfile
from luthier_gguf.ollama import check_ollama, register_model
from luthier_gguf.vocabulary import read_vocabulary
from luthier_gguf.weights import check_widths, place_weights
from luthier_gguf.writing import write_file

FILE: Final = "model.gguf"
MODELFILE: Final = "Modelfile"
log = get_logger()


class GgufExporter:
    """The part that writes GGUF files of Llama, Mistral, Qwen 2 and Qwen 3 models."""

    def __init__(self, options: Gguf) -> None:
        self.options = options

    def check(self, config: Any) -> None:
        """Raise `part-unsupported` if llama.cpp would compute the model differently, or the type cannot hold it.

        Raise `recipe-conflict` or `gguf:ollama` if the export cannot be registered in Ollama.
        """
        find_architecture(config)
        check_widths(config, self.options)
        if self.options.ollama is not None:
            if not self.options.modelfile:
                raise LuthierError("recipe-conflict", "Ollama reads a Modelfile, and none is written",
                                   where="gguf.ollama", remedy="Leave modelfile out, or ollama.")  # fmt: skip
            check_ollama()

    def export(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Write `model.gguf` and, unless switched off, `Modelfile`."""
        vocabulary = read_vocabulary(model, tokenizer, self.options)
        write_file(folder / FILE, model, vocabulary, self.options)
        kinds = [place.kind.name for place in place_weights(model, self.options).values()]
        log.info("written as GGUF", tensors={kind: kinds.count(kind) for kind in sorted(set(kinds))})
        if self.options.modelfile:
            write_modelfile(folder / MODELFILE, FILE, tokenizer, vocabulary)

    def verify(self, model: Any, tokenizer: Any, folder: Path) -> dict[str, float]:
        """Read the file with gguf's reader and with transformers; compare metadata, tokens, weights and logits.

        What agrees is registered in Ollama, if that is asked for.
        """
        differences = compare_file(folder / FILE, model, tokenizer, self.options)
        if self.options.ollama is not None:
            register_model(self.options.ollama, folder / MODELFILE)
        return differences
