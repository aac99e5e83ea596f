"""The exporter `bitnet_packed`: it writes a model of quantizer `bitnet` as transformers' packed checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from luthier import LuthierError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier_bitnet.options import Packed
from luthier_bitnet.packed import write_packed

# largest relative difference of logits (root mean square). Scales are stored, and layers computed, in the model's
# dtype, and an activation between two codes may be rounded to either
BOUNDS: Final = {torch.float32: 5e-3}
COARSE: Final = 0.03
LENGTH: Final = 32
LINEAR: Final = {"divide": "BitLinear", "multiply": "AutoBitLinear"}


class PackedExporter:
    """The part that writes packed BitNet checkpoints."""

    def __init__(self, options: Packed) -> None:
        self.options = options

    def export(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Write the two-bit weights, the configuration and the tokenizer."""
        write_packed(model, folder, self.options.weight_scale)
        tokenizer.save_pretrained(folder)

    def verify(self, model: Any, tokenizer: Any, folder: Path) -> dict[str, float]:
        """Load the folder with transformers, and compare kinds of layers, logits, texts and the chat template."""
        with _evaluated(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            read = _load(folder, model)
            kinds = {type(module).__name__ for module in read.modules()}
            if LINEAR[self.options.weight_scale] not in kinds:
                raise _mismatch(folder, "transformers reads no packed layers", sorted(kinds))
            error = _logit_error(model, read)
        bound = BOUNDS.get(model.dtype, COARSE)
        if not error <= bound:
            raise _mismatch(folder, f"logits differ by more than {bound:g} of their spread", error)
        _compare_tokenizers(folder, tokenizer)
        return {"logits, relative": error}


def _load(folder: Path, model: Any) -> Any:
    """Return the model as transformers reads it."""
    attention = model.config._attn_implementation
    try:
        read = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=attention, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _mismatch(folder, f"transformers cannot read it: {error}", None) from error
    return read.eval().to(model.device)


@contextlib.contextmanager
def _evaluated(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _logit_error(model: Any, read: Any) -> float:
    """Return the RMS difference of logits, divided by the standard deviation of the model's own."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, LENGTH), generator=random).to(model.device)
    ours, theirs = (_logits(either, ids) for either in (model, read))
    spread = (ours - ours.mean(-1, keepdim=True)).square().mean().sqrt()
    return float((theirs - ours).square().mean().sqrt() / spread)


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.float()


def _compare_tokenizers(folder: Path, tokenizer: Any) -> None:
    read = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = "It's 7 o'clock,  isn't\tit?\n\nYes: naïve — 北京"
    if read(text)["input_ids"] != tokenizer(text)["input_ids"] or read.chat_template != tokenizer.chat_template:
        raise _mismatch(folder, "the tokenizer differs from the model's", None)


def _mismatch(folder: Path, problem: str, value: object) -> LuthierError:
    return LuthierError("artifact-mismatch", problem, where=str(folder), found=value)
