"""The model that a quantizer's checks use: a tiny Llama in quantized form, and the same model before."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any, Final

from luthier.plugins.contracts.values import Multipliers, Progress
from luthier.testing.laws import Subject, not_run

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.plugins.records import Record

SHAPE: Final[dict[str, Any]] = {"hidden_size": 128, "intermediate_size": 256}  # sizes that usual groups divide
TOTAL: Final = 10  # steps of a schedule


class Quantized:
    """A tiny Llama after the quantizer's `apply`. `purpose` and `has_values` are those of the context that it gets."""

    def __init__(
        self,
        subject: Subject,
        options: Any,
        seed: int = 0,
        *,
        purpose: Any = "train",
        has_values: bool = True,
        device: str | None = None,
    ) -> None:
        import attrs

        from luthier.model.weights.quantized import apply_quantizer
        from luthier.testing.contexts import context

        self.part = subject.build(options)
        self.dense = make_model(seed)
        model = _loaded(self.part, seed)
        if device is not None:
            model.to(device).tie_weights()  # moving to `meta` unties them
        around = context(model, seed, TOTAL, self.part)
        self.context = attrs.evolve(around, purpose=purpose, has_values=has_values)
        self.model = apply_quantizer(self.part, model, self.context)
        self.originals = dict(self.dense.named_modules())

    def tell(self, step: int) -> Multipliers:
        """Tell the quantizer that `step` of the schedule's steps are done."""
        return self.part.progressed(Progress(step=step, total_steps=TOTAL, epoch=step / TOTAL))

    def layers(self) -> dict[str, Any]:
        """Return the quantizer's layers: those that it can dequantize."""
        return {n: m for n, m in self.model.named_modules() if self.part.dequantize(m) is not None}

    def own_layers(self) -> dict[str, Any]:
        """Return the quantizer's layers. If there are none, skip the check."""
        return self.layers() or not_run("it quantizes no layer")

    def original(self, path: str) -> Tensor:
        """Return the weight [out, in] that a layer had before quantization."""
        from luthier.step.context import dense_weight
        from luthier.testing.contexts import plain_quantizer

        return dense_weight(self.originals[path], plain_quantizer()).detach()

    def outputs(self) -> Tensor:
        """Return the logits [12, V] of a fixed row, computed as in an evaluation."""
        import torch

        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self.model(input_ids=torch.arange(12)[None], use_cache=False).logits[0]
        finally:
            self.model.train(training)


def lets_train(record: Record) -> bool:
    """Return True if weights of the quantizer's layers may be trained: latent ones, or exact ones."""
    return bool(getattr(record, "trains", False)) or "dense-weights" in record.provides


def make_model(seed: int) -> Any:
    """Return the model to which a check applies its quantizer."""
    from luthier.testing.worlds import tiny_model

    return tiny_model(seed=seed, **SHAPE)


def _loaded(part: Any, seed: int) -> Any:
    """Return the tiny model, read through transformers if the quantizer has arguments for that."""
    arguments = part.load_arguments()
    if not arguments:
        return make_model(seed)
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        make_model(seed).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **arguments)
