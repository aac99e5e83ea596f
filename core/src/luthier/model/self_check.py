"""The probe before training: packed and shared documents against separate ones, and these against the model's own
forward, to which an adapter's prompts come as they do in generation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor

from luthier.data.batches.batch import Batch, chain_of, collate_examples, continue_documents
from luthier.data.examples import TokenExample
from luthier.errors import LuthierError
from luthier.model.attention import NAME, ordinary_attention
from luthier.model.generation.generation_inputs import compute_logits
from luthier.model.policy import ModelPolicy
from luthier.plugins.contracts.protocols import Adapter

OPERATION_ERRORS = ("operation-differs", "operation-failed")
LENGTHS = (7, 12, 4, 3, 5)
LINKS = (-1, -1, -1, 1, 1)  # the last two documents continue the second one


Computing = Callable[[], AbstractContextManager[Any]]


def find_disagreement(
    model: Any, *, packing: bool = True, computing: Computing = nullcontext, adapter: Any = None,
    batch: Batch | None = None,
) -> str | None:  # fmt: skip
    """Return why this model cannot be trained, packed or one document at a time, or None.

    Packed attention is installed. `computing` is the precision's; None finds more, as nothing is rounded. `adapter` is
    what is attached, where its virtual tokens and prefixes are to be tried too. `batch` None: `make_documents`.
    """
    batch = make_documents(model) if batch is None else batch
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), computing():
            separate = _separate(batch, lambda part: ModelPolicy(model, adapter).token_logprobs(part))
            packed = ModelPolicy(model, adapter).token_logprobs(batch) if packing else separate
            own = _own(model, batch, adapter)
    except LuthierError as error:
        if error.code in OPERATION_ERRORS:  # the error of a plugin's operation, not of the architecture
            raise
        return error.problem
    finally:
        model.train(training)
    exact = computing is nullcontext and model.dtype in (torch.float32, torch.float64) and not _rounds(model)
    bound = 1e-4 if exact else 0.15
    if not torch.allclose(packed, separate, atol=bound, rtol=bound):
        return f"packed documents differ from separate ones by {float((packed - separate).abs().max()):.2g}"
    if not torch.allclose(separate, own, atol=bound, rtol=bound):
        return f"log-probabilities differ from the model's own forward by {float((separate - own).abs().max()):.2g}"
    return None


def _rounds(model: Any) -> bool:
    """Return True if a layer says that it rounds activations: one on the edge of two codes falls to either side."""
    return any(getattr(layer, "rounds_activations", False) for layer in model.modules())


def check_architecture(model: Any, *, packing: bool, computing: Computing = nullcontext, adapter: Any = None) -> None:
    """Raise `model-architecture` naming the architecture where the probe fails."""
    reason = find_disagreement(model, packing=packing, computing=computing, adapter=adapter)
    if reason is None:
        return
    with computing():
        _refuse_nonfinite(model)
    helps = packing and find_disagreement(model, packing=False, computing=computing, adapter=adapter) is None
    remedy = "Set packing: false." if helps else "Choose another model, or report the architecture."
    raise LuthierError("model-architecture", reason, where=type(model).__name__, remedy=remedy)


def _refuse_nonfinite(model: Any) -> None:
    """Raise for a NaN or infinity: the weights or their dtype are at fault, and not the architecture."""
    from luthier.model.nonfinite import trace_model

    batch = make_documents(model)
    finding = trace_model(model, batch, lambda: ModelPolicy(model).token_logprobs(batch))
    if finding is not None:
        remedy = "Check the base model's files, and that model.dtype and precision can hold its numbers."
        raise LuthierError("train-nonfinite", f"before the first step: {finding.told}", where="model", remedy=remedy)


def _own(model: Any, batch: Batch, adapter: Adapter) -> Tensor:
    """Return [T] from the model's plain forward over each document, with its ordinary attention."""
    model.set_attn_implementation(ordinary_attention(model))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _separate(batch, lambda part: _plain(model, part, adapter))
    finally:
        model.set_attn_implementation(NAME)


def _plain(model: Any, batch: Batch, adapter: Adapter) -> Tensor:
    logits = compute_logits(model, batch.input_ids, adapter)
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
    values = logits[:-1].log_softmax(-1).gather(-1, batch.input_ids[1:, None]).squeeze(-1)
    return torch.cat([values.new_zeros(1), values])


def make_documents(model: Any) -> Batch:
    """Return short documents of random tokens, every label counted, of which some continue another."""
    random = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    rows = [torch.randint(0, size, (length,), generator=random).numpy() for length in LENGTHS]
    batch = collate_examples([TokenExample(input_ids=row, labels=row) for row in rows])
    return continue_documents(attrs.evolve(batch, labels=batch.input_ids), LINKS).to(model.device)


def _separate(batch: Batch, compute: Callable[[Batch], Tensor]) -> Tensor:
    """Return [T] of `compute` over each document alone, what it continues before it."""
    pieces, lengths = batch.input_ids.cpu().split(batch.lengths.tolist()), batch.lengths.tolist()
    values = []
    for document, length in enumerate(lengths):
        ids = torch.cat([pieces[d] for d in chain_of(LINKS, document)]).numpy()
        values.append(compute(collate_examples([TokenExample(input_ids=ids, labels=ids)]).to(batch.device))[-length:])
    return torch.cat(values)
