"""The contract of a quantizer: the form in which the base model's weights are stored."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from luthier.plugins.contracts.values import Context, Multipliers, Progress

if TYPE_CHECKING:
    from torch import Tensor

# not `model.safetensors`, which transformers would load as plain weights
QUANTIZED_FILE: Final = "quantized.safetensors"


@runtime_checkable
class Quantizer(Protocol):
    """The form in which the base model's weights are stored.

    A quantized layer keeps `in_features` and `out_features`; it belongs to this quantizer if `dequantize` returns its
    weight. One that stands for transformers' `Conv1D`, whose weight is [in, out] in files, has `transposed = True`.

    A merge replaces each such layer by a dense one with that weight, and then merges the adapter: its base is
    what the quantized layers compute, not the checkpoint. `trains` and `mergeable` come from the record; an object that
    is passed in Python has them as its own attributes.

    If `trains` is True, the layers keep a latent weight as a parameter, `provides` has "dense-weights", and the adapter
    `full` trains it. The run's artifact is then what `save` writes. It is opened by making a model of its config,
    calling `apply` (with `has_values` False) and then `load`. A layer's further state, beyond its state dict, follows
    from `progressed`.
    """

    trains: bool = False
    mergeable: bool = True

    @abstractmethod
    def apply(self, model: Any, context: Context) -> Any:
        """Replace the model's weights by quantized ones, in place, and return the model.

        It is called for every `Context.purpose`; torch is seeded before. If `has_values` is False, it makes the same
        layers and reads no weight. A second call changes nothing. `choose_dense_layers` and `check_finite_weights`, of
        `luthier`, say which layers may be taken, and refuse models that may not be quantized.
        """
        ...

    @abstractmethod
    def dequantize(self, layer: Any) -> Tensor | None:
        """Return the layer's weight [out, in] in float32, or None if the layer does not belong to this quantizer."""
        ...

    @abstractmethod
    def requantize(self, layer: Any, weight: Tensor) -> None:
        """Put a float32 weight [out, in] into a quantized layer."""
        ...

    def load_arguments(self) -> dict[str, Any]:
        """Return keyword arguments for `from_pretrained`."""
        return {}

    def progressed(self, progress: Progress) -> Multipliers:
        """Take note of the steps that are done. It is called after `apply` and before every use of the model.

        Uses are: each step, each evaluation, loading the best weights, writing the artifact and checking it, and
        opening a finished run. What the layers compute depends on the last call alone: a call with the same steps
        changes nothing, and a call with fewer steps goes back. The returned multipliers apply to the step that follows.
        """
        return Multipliers()

    def save(self, model: Any, folder: Path) -> None:
        """Write the weights of a model whose quantized layers were trained. Its config is in the folder already.

        It is called only if the record says `trains`. The default writes the state dict as safetensors.
        """
        from safetensors.torch import save_model

        save_model(model, str(folder / QUANTIZED_FILE))

    def load(self, folder: Path, model: Any) -> Any:
        """Return the model that `save` wrote.

        `model`, made of its config and passed through `apply`, may be filled in place.
        """
        from safetensors.torch import load_model

        load_model(model, folder / QUANTIZED_FILE, device=str(model.device))
        return model

    def state(self) -> dict[str, Any]:
        """Return all that a resume needs beyond the number of steps, as tensors and JSON values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        del state  # the default `state` returns nothing
