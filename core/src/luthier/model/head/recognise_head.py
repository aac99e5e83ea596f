"""The recognition of heads that are a plain linear layer, perhaps scaled and capped: by numbers, not by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from luthier.hardware.low_precision import imitates_dtype
from luthier.model.head.tiles import Curve, Linear
from luthier.model.weights.layers import HOOKS

WORDS: Final = ("logit", "scal", "multiplier", "cap")  # words in the names of a config's scales and soft caps of logits
LARGEST: Final = 60.0  # logits of this size show whether there is a soft cap


def head_obstacle(model: Any, body: nn.Module) -> str | None:
    """Return why the head cannot be a plain linear layer, as far as that is seen without computing."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}"
    if "forward" in vars(head) or any(getattr(head, name) for name in HOOKS):
        return "something is hooked to its head"
    inside = {id(module) for module in (*body.modules(), head)}
    beside = [
        n for n, m in model.named_modules() if id(m) not in inside and next(m.parameters(False), None) is not None
    ]
    return f"parameters stand beside its head, in {beside[0] or 'the model'}" if beside else None


def fit_curve(model: Any, own: Callable[[Tensor], Tensor]) -> Curve | None:
    """Return the curve by which a linear head equals `own` ([C, H] to [C, V]); None if there is none."""
    head = model.get_output_embeddings()
    device = head.weight.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _undisturbed(device):
        rows = _samples(head)
        products = nn.functional.linear(rows, head.weight, head.bias)
        products = products.to(torch.promote_types(torch.float32, products.dtype))
        expected = own(rows).to(products.dtype)
        bound = min(64 * torch.finfo(head.weight.dtype).eps, 0.02) * expected.abs().amax(1, keepdim=True)
        for curve in _candidates(model.config.get_text_config()):
            # the comparison is asked in this form so that tensors without data, which predict memory, agree
            if not bool(((curve.bend_(products.clone()) - expected).abs() > bound).any()):
                return curve
    return None


def linear_head(head: nn.Linear, curve: Curve) -> Linear:
    """Return the head in autocast's dtype or its own; in float32, tile by tile, if that dtype is emulated."""
    kind, dtype = head.weight.device.type, head.weight.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:  # autocast itself leaves float64 alone
        dtype = torch.get_autocast_dtype(kind)
    dtype = torch.float32 if imitates_dtype(head.weight.device, dtype) else dtype
    return Linear(weight=head.weight, bias=head.bias, curve=curve, dtype=dtype)


def _samples(head: nn.Linear) -> Tensor:
    """Return [8, H] random rows, whose largest products are about 1 and about LARGEST."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(8, head.in_features, generator=random).to(head.weight)
    largest = (rows @ head.weight.t()).abs().amax(1, keepdim=True)
    sizes = torch.tensor([1.0, LARGEST]).repeat(4)[:, None].to(head.weight)
    return rows * (sizes / largest)


def _candidates(config: Any) -> Iterator[Curve]:
    """No curve, then every scale and soft cap that the config's numbers allow."""
    numbers = {
        float(value)
        for name, value in config.to_dict().items()
        if any(word in name for word in WORDS) and type(value) in (int, float) and value > 0
    }
    for cap in (None, *sorted(numbers)):
        for scale in (1.0, *sorted({*numbers, *(1 / n for n in numbers)})):
            yield Curve(scale=scale, cap=cap)


def _undisturbed(device: torch.device) -> Any:
    """Restore the random states after this context, whatever the head draws."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
