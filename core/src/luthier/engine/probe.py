"""The probe before training: packed against separate documents, and our head against the model's own forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from luthier.data.examples import TokenExample
from luthier.engine.attention import NAME, ordinary
from luthier.engine.batch import Batch, collate
from luthier.engine.policy import ModelPolicy
from luthier.errors import LuthierError

LENGTHS = (7, 12, 4)


Computing = Callable[[], AbstractContextManager[Any]]


def disagreement(model: Any, *, packing: bool = True, computing: Computing = nullcontext) -> str | None:
    """Why this model cannot be trained, packed or one document at a time, or None. Packed attention is installed.

    `computing` is the precision's; None finds more, as nothing is rounded.
    """
    batch = _documents(model)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), computing():
            separate = torch.cat([_logprobs(model, part) for part in _split(batch)])
            packed = _logprobs(model, batch) if packing else separate
            own = _own(model, batch)
    except LuthierError as error:
        return error.problem
    finally:
        model.train(training)
    bound = 1e-4 if computing is nullcontext and model.dtype in (torch.float32, torch.float64) else 0.15
    if not torch.allclose(packed, separate, atol=bound, rtol=bound):
        return f"packed documents differ from separate ones by {float((packed - separate).abs().max()):.2g}"
    if not torch.allclose(separate, own, atol=bound, rtol=bound):
        return f"log-probabilities differ from the model's own forward by {float((separate - own).abs().max()):.2g}"
    return None


def check(model: Any, *, packing: bool, computing: Computing = nullcontext) -> None:
    """Raise `model-architecture` naming the architecture where the probe fails."""
    reason = disagreement(model, packing=packing, computing=computing)
    if reason is None:
        return
    with computing():
        _refuse_nonfinite(model)
    helps = packing and disagreement(model, packing=False, computing=computing) is None
    remedy = "Set packing: false." if helps else "Choose another model, or report the architecture."
    raise LuthierError("model-architecture", reason, where=type(model).__name__, remedy=remedy)


def _refuse_nonfinite(model: Any) -> None:
    """What differs because it is no number is the weights' fault, or of their dtype, and not the architecture's."""
    from luthier.engine.health.trace import trace_model

    batch = _documents(model)
    found = trace_model(model, batch, lambda: _logprobs(model, batch))
    if found is not None:
        remedy = "Check the base model's files, and that model.dtype and precision can hold its numbers."
        raise LuthierError("train-nonfinite", f"before the first step: {found.told}", where="model", remedy=remedy)


def _logprobs(model: Any, batch: Batch) -> Tensor:
    return ModelPolicy(model).token_logprobs(batch)


def _own(model: Any, batch: Batch) -> Tensor:
    """[T] from the model's plain forward over each document, with its ordinary attention."""
    model.set_attn_implementation(ordinary(model))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = [_plain(model, part) for part in _split(batch)]
    finally:
        model.set_attn_implementation(NAME)
    return torch.cat(parts)


def _plain(model: Any, batch: Batch) -> Tensor:
    mask = torch.ones_like(batch.input_ids)[None]
    logits = model(input_ids=batch.input_ids[None], attention_mask=mask, use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
    found = logits[:-1].log_softmax(-1).gather(-1, batch.input_ids[1:, None]).squeeze(-1)
    return torch.cat([found.new_zeros(1), found])


def _documents(model: Any) -> Batch:
    """Three short documents of random tokens, every label counted."""
    random = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    rows = [torch.randint(0, size, (length,), generator=random).numpy() for length in LENGTHS]
    return collate([TokenExample(input_ids=row, labels=row) for row in rows]).to(model.device)


def _split(batch: Batch) -> list[Batch]:
    ids = batch.input_ids.cpu().split(batch.lengths.tolist())
    return [collate([TokenExample(input_ids=i.numpy(), labels=i.numpy())]).to(batch.device) for i in ids]
