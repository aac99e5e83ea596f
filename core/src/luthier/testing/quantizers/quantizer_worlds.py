"""Checks of a quantizer's `apply`: with values and without, and with random draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from luthier.errors import LuthierError
from luthier.plugins.records import Record
from luthier.testing.laws import Subject, law, not_run
from luthier.testing.quantizers.quantized_world import TOTAL, Quantized
from luthier.testing.strategies import drawn_seeds

if TYPE_CHECKING:
    from torch import Tensor

FEW: Final = 2  # examples of a check that builds models


def _quantizes(record: Record) -> bool:
    return getattr(record, "bits", None) is not None


@law(FEW, when=_quantizes, seed=drawn_seeds())
def applies_without_values(subject: Subject, options: Any, seed: int) -> None:
    """On a model on meta, as on a rank that waits for its weights, the layers are the same, also once they are filled.

    The check is skipped for a part that refuses to be applied there: such ranks then read the weights themselves.
    """
    import torch

    real = Quantized(subject, options, seed)
    if real.part.load_arguments():
        not_run("it works while weights are loaded")
    try:
        hollow = Quantized(subject, options, seed, purpose="hollow", has_values=False, device="meta")
    except (LuthierError, RuntimeError, TypeError, ValueError) as error:
        not_run(f"it needs the weights: {next(iter(str(error).splitlines()), '')}")
    expected, hollow_tensors = _tensors(real.model), _tensors(hollow.model)
    kinds = [{name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} for tensors in (expected, hollow_tensors)]
    differ = sorted(name for name, _ in kinds[0].items() ^ kinds[1].items())
    assert not differ, f"without values the model has other tensors: {', '.join(differ[:4])}"
    hollow.model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for name, tensor in _tensors(hollow.model).items():
            tensor.copy_(expected[name])
    for step in (0, TOTAL):
        real.tell(step)
        hollow.tell(step)
        agreed = hollow.outputs().equal(real.outputs())
        assert agreed, "made without values and filled afterwards, the model has other outputs"


@law(FEW, when=_quantizes, seed=drawn_seeds())
def apply_follows_the_seed(subject: Subject, options: Any, seed: int) -> None:
    """A quantizer's random draws depend on the run's seed alone: two models with one seed have the same outputs."""
    import torch

    first = Quantized(subject, options, seed).outputs()
    torch.manual_seed(seed + 1)
    assert Quantized(subject, options, seed).outputs().equal(first), "applied twice with one seed, the outputs differ"


def _tensors(model: Any) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
