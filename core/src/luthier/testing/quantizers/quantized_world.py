"""The world that a quantizer meets in a check: a tiny Llama in its form, beside the same model as it was."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any, Final

from luthier.plugins.contracts.values import Multipliers, Progress
from luthier.testing.laws import Subject, not_run

if TYPE_CHECKING:
    from torch import Tensor

SHAPE: Final[dict[str, Any]] = {"hidden_size": 128, "intermediate_size": 256}  # rows that usual groups divide
TOTAL: Final = 10  # steps of a schedule


class Quantized:
    """A tiny Llama as the quantizer made it. `purpose` and `has_values` are what `apply` is told of the world."""

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
            model.to(device).tie_weights()  # to `meta` it unties them
        around = context(model, seed, TOTAL, self.part)
        self.context = attrs.evolve(around, purpose=purpose, has_values=has_values)
        self.model = apply_quantizer(self.part, model, self.context)
        self.originals = dict(self.dense.named_modules())

    def tell(self, step: int) -> Multipliers:
        """Tell the quantizer that `step` of the schedule's steps are done."""
        return self.part.progressed(Progress(step=step, total_steps=TOTAL, epoch=step / TOTAL))

    def layers(self) -> dict[str, Any]:
        """Return the layers that are the quantizer's: those it can dequantize."""
        return {n: m for n, m in self.model.named_modules() if self.part.dequantize(m) is not None}

    def own_layers(self) -> dict[str, Any]:
        """Return the quantizer's layers; where there are none, the check that asks has nothing to run."""
        return self.layers() or not_run("it quantizes no layer")

    def original(self, path: str) -> Tensor:
        """Return the weight [out, in] that a layer had before."""
        from luthier.step.context import dense_weight
        from luthier.testing.contexts import plain_quantizer

        return dense_weight(self.originals[path], plain_quantizer()).detach()

    def outputs(self) -> Tensor:
        """Return the logits [12, V] of a fixed row, as an evaluation computes them."""
        import torch

        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self.model(input_ids=torch.arange(12)[None], use_cache=False).logits[0]
        finally:
            self.model.train(training)


def make_model(seed: int) -> Any:
    """Return the model that every quantizer of a check is applied to."""
    from luthier.testing.worlds import tiny_model

    return tiny_model(seed=seed, **SHAPE)


def _loaded(part: Any, seed: int) -> Any:
    """The tiny model, read through transformers where the quantizer has arguments for that."""
    arguments = part.load_arguments()
    if not arguments:
        return make_model(seed)
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        make_model(seed).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **arguments)
