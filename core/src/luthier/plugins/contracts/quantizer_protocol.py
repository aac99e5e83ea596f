"""The protocol of a quantizer, which stores the weights of the base model in fewer bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from luthier.plugins.contracts.values import Context, Multipliers, Progress

if TYPE_CHECKING:
    from torch import Tensor

# not `model.safetensors`, which transformers would load as plain weights
QUANTIZED_FILE: Final = "quantized.safetensors"


@runtime_checkable
class Quantizer(Protocol):
    """The part that stores the weights of the base model in fewer bits.

    A quantized layer keeps the attributes `in_features` and `out_features`. A layer belongs to this quantizer if
    `dequantize` returns a weight for it. A merge replaces each quantized layer by a dense one with the dequantized
    weight, and then merges the adapter into that weight, not into the weight of the checkpoint. `trains` and
    `mergeable` are taken from the record; an object that is passed in Python sets them as attributes.

    A quantized layer that replaces a `Conv1D` of transformers, whose weight is [in, out] in a checkpoint, sets
    `transposed = True`. A layer that rounds activations sets `rounds_activations = True`.

    If `trains` is True, the layers keep a full-precision weight as a parameter, which the adapter `full` trains;
    `provides` must then contain "dense-weights". The artifact of the run is what `save` writes. To open it, the core
    makes a model from its config, calls `apply` with `has_values` False, and then `load`. Whatever a layer needs beyond
    its state dict must follow from `progressed`.
    """

    trains: bool = False
    mergeable: bool = True
    needs_metrics: Mapping[str, str] = {}  # never changed in place; a read-only view of it could not be copied

    @abstractmethod
    def apply(self, model: Any, context: Context) -> Any:
        """Quantize the weights of the model in place, and return the model.

        It is called for every `Context.purpose`, with torch's generators seeded. If `context.has_values` is False, it
        makes the same layers without reading any weight. A second call on the same model changes nothing.
        `luthier.replace_dense_layers` does this for an ordinary quantizer. `luthier.choose_dense_layers` returns the
        layers that may be quantized, and `luthier.check_finite_weights` refuses weights that are not finite.
        """
        ...

    @abstractmethod
    def dequantize(self, layer: Any) -> Tensor | None:
        """Return the layer's weight [out, in] in float32, or None if the layer is not one of this quantizer's."""
        ...

    @abstractmethod
    def requantize(self, layer: Any, weight: Tensor) -> None:
        """Quantize a float32 weight [out, in] into a quantized layer."""
        ...

    def load_arguments(self) -> dict[str, Any]:
        """Return arguments for transformers' `from_pretrained`, to quantize while the model is loaded."""
        return {}

    def progressed(self, progress: Progress) -> Multipliers:
        """Set the layers to the position of the run, and return the multipliers of the step that follows.

        It is called after `apply`, and then before each training step and evaluation, when the best weights are loaded,
        when the artifact is written or checked, and when a finished run is opened. What the layers compute must depend
        on the last call alone: a call with the same step changes nothing, and one with an earlier step goes back.
        """
        return Multipliers()

    def needed_tokens(self, step: int) -> Mapping[str, int]:
        """Return the fewest tokens that the first micro-batch of a training step (from 0) may have, by option.

        `{option: tokens}`; empty if any number will do. A run whose rows give fewer is refused before it starts, at
        that option, and `luthier plan` refuses it too.
        """
        del step
        return {}

    def tune(self, metrics: Mapping[str, float], evaluate: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        """Try other settings of the layers on the validation rows, and return the metrics of those that are kept.

        It is called after each evaluation in training, on every rank, with its metrics. `evaluate()` evaluates the
        layers as they are at that time. It may raise, if the run is told to end: the layers must then be as they were
        before `tune`, which is called again when the run is resumed. What is kept belongs to `state`, and to what
        `save` writes, so that only an adapter that writes the whole model goes with it. The attribute `needs_metrics =
        {option: metric}` names the metrics that it reads, and is empty if it has nothing to try.
        """
        del evaluate
        return metrics

    def save(self, model: Any, folder: Path) -> None:
        """Write the weights of a model with trained quantized layers into a folder that holds its config already.

        It is called only if the record says `trains`. The default writes the state dict as safetensors.
        """
        from safetensors.torch import save_model

        save_model(model, str(folder / QUANTIZED_FILE))

    def load(self, folder: Path, model: Any) -> Any:
        """Load what `save` wrote and return the model. `model` has the same config after `apply`; it may be filled."""
        from safetensors.torch import load_model

        load_model(model, folder / QUANTIZED_FILE, device=str(model.device))
        return model

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs besides its position, as tensors and JSON values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        del state  # the default `state` returns nothing
