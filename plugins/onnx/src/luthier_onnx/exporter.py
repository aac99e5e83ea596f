"""The exporter `onnx`: the graph that torch traces, its weights, and the files of config and tokenizer besides."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from luthier import LuthierError, get_logger

from luthier_onnx import Onnx
from luthier_onnx.comparison import compare_files
from luthier_onnx.traced import OUTPUT, Traced, draw_inputs

FILE: Final = "model.onnx"
log = get_logger()


class OnnxExporter:
    """The part that writes ONNX files of causal language models, in float32, without a cache of keys and values."""

    def __init__(self, options: Onnx) -> None:
        self.options = options

    def check(self, config: Any) -> None:
        """Raise `part-unsupported` for a model that is no causal language model."""
        if getattr(config, "is_encoder_decoder", False):
            problem = "the exporter 'onnx' writes causal language models, and this one has an encoder"
            raise LuthierError("part-unsupported", problem, where="exporter", found=config.model_type)

    def export(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Write `model.onnx` with its weights in `model.onnx.data`, config.json and the tokenizer's files.

        Raises `part-unsupported` if torch cannot trace the model.
        """
        with opened(model) as plain, quiet():
            traced = Traced(plain).eval()
            inputs = draw_inputs(plain, lengths=(5, 3))
            size = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
            try:
                program: Any = torch.onnx.export(
                    traced, tuple(inputs.values()), dynamo=True, dynamic_shapes=((size,) * len(inputs),), verbose=False,
                    input_names=list(inputs), output_names=[OUTPUT],
                )  # fmt: skip
            except torch.onnx.OnnxExporterError as error:
                reason = next(iter(str(error.__cause__ or error).splitlines()), "")
                problem = f"torch cannot trace this model for ONNX: {reason}"
                raise LuthierError("part-unsupported", problem, where="exporter", found=type(model).__name__) from error
            program.save(folder / FILE, external_data=True)
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        log.info("written as ONNX", inputs=list(inputs), nodes=len(program.model.graph))

    def verify(self, model: Any, tokenizer: Any, folder: Path) -> dict[str, float]:
        """Run the file with ONNX Runtime and compare logits; load the tokenizer and compare tokens and template."""
        with opened(model) as plain:
            return compare_files(folder / FILE, plain, tokenizer, self.options)


@contextmanager
def opened(model: Any) -> Iterator[Any]:
    """Yield the model in float32, on the processor, for evaluation: itself, if it is so, else a copy."""
    fits = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    plain = model if fits else copy.deepcopy(model).to("cpu", torch.float32)
    training = plain.training
    plain.eval()
    try:
        with torch.no_grad():
            yield plain
    finally:
        plain.train(training)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what torch's exporter says of packages that it does not need here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
