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

# Largest relative differences of logits (root mean square). An activation between two codes is rounded to either, by
# the last bit of float32, and layers after it make much of that: rows are short, so that some have no such activation.
BOUNDS: Final = {torch.float32: 5e-3}  # of the row that agrees best
COARSE: Final = 0.03  # of all rows together, and of any row in another dtype, in which scales are rounded too
ROWS: Final = 16
LENGTH: Final = 4
NOISE: Final = 1e-5  # of embeddings, relative: what it changes is the least that another program must be allowed
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
            found, allowed = _logit_errors(model, read)
        bounds = BOUNDS.get(model.dtype, COARSE), COARSE
        for error, bound, own, rows in zip(found, bounds, allowed, ("every row", "all rows together"), strict=True):
            limit = max(bound, 2 * own)
            if not error <= limit:
                raise _mismatch(folder, f"logits of {rows} differ by more than {limit:g} of their spread", error)
        _compare_tokenizers(folder, tokenizer)
        return {"logits, relative": found[0], "logits of all rows, relative": found[1]}


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


def _logit_errors(model: Any, read: Any) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return by how much logits of the other model differ, and by how much a little noise changes the model's own.

    Each is the least difference of a row and that of all rows, relative to the spread of the logits.
    """
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (ROWS, LENGTH), generator=random).to(model.device)
    states, other_states = (either.get_input_embeddings()(ids) for either in (model, read))
    noisy = states * (1 + NOISE * torch.randn(states.shape, generator=random).to(states))
    ours = _logits(model, states)
    spread = (ours - ours.mean(-1, keepdim=True)).square().mean().sqrt()
    rows = [
        ((other - ours) / spread).square().mean((1, 2))
        for other in (_logits(read, other_states), _logits(model, noisy))
    ]
    found, allowed = ((float(row.min().sqrt()), float(row.mean().sqrt())) for row in rows)
    return found, allowed


def _logits(model: Any, states: Tensor) -> Tensor:
    """Return logits [ROWS, LENGTH, V] of embeddings [ROWS, LENGTH, H]."""
    mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    logits: Tensor = model(inputs_embeds=states, attention_mask=mask, use_cache=False).logits
    return logits.float()


def _compare_tokenizers(folder: Path, tokenizer: Any) -> None:
    read = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = "It's 7 o'clock,  isn't\tit?\n\nYes: naïve — 北京"
    if read(text)["input_ids"] != tokenizer(text)["input_ids"] or read.chat_template != tokenizer.chat_template:
        raise _mismatch(folder, "the tokenizer differs from the model's", None)


def _mismatch(folder: Path, problem: str, value: object) -> LuthierError:
    return LuthierError("artifact-mismatch", problem, where=str(folder), found=value)
