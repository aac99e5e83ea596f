"""The contract of a quantizer: the form in which the base model's weights are stored."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from luthier.plugins.contracts.values import Context, Multipliers, Progress

if TYPE_CHECKING:
    from torch import Tensor

QUANTIZED_FILE: Final = "quantized.safetensors"  # transformers would take `model.safetensors` for plain weights


@runtime_checkable
class Quantizer(Protocol):
    """The form in which the base model's weights are stored.

    A quantized layer keeps `in_features` and `out_features`; it is this quantizer's if `dequantize` gives its weight.
    A merge puts a dense layer with that weight in the place of each, and then has the adapter merged: its base is what
    the quantized layers compute, not the checkpoint. `trains` and `mergeable` come from the record; an object that is
    passed in Python says them itself.

    Where `trains` is True the layers keep a latent weight as a parameter, `provides` has "dense-weights", and `full`
    trains it. The run's artifact is then what `save` writes, and is opened by making a model of its config, `apply`
    (with `has_values` False) and `load`. What a layer needs beyond its state dict follows from `progressed`.
    """

    trains: bool = False
    mergeable: bool = True

    @abstractmethod
    def apply(self, model: Any, context: Context) -> Any:
        """Replace the model's weights by quantized ones, in place, and return the model.

        It is called in every world that `Context.purpose` names; torch is seeded before. Where `has_values` is False
        the same layers are made, and no weight is read. A second call changes nothing. `choose_dense_layers` and
        `check_finite_weights`, of `luthier`, say which layers may be taken, and refuse the models that may not.
        """
        ...

    @abstractmethod
    def dequantize(self, layer: Any) -> Tensor | None:
        """Return the layer's weight [out, in] in float32, or None for a layer that is not this quantizer's."""
        ...

    @abstractmethod
    def requantize(self, layer: Any, weight: Tensor) -> None:
        """Put a float32 weight [out, in] into a quantized layer."""
        ...

    def load_arguments(self) -> dict[str, Any]:
        """Return keyword arguments for `from_pretrained`."""
        return {}

    def progressed(self, progress: Progress) -> Multipliers:
        """Take note of the steps done. It is called after `apply` and before every run of the model.

        That is: each step, each evaluation, the best weights once they are loaded, the artifact and its check, and
        what opens a finished run. What the layers compute follows from the last call alone: one with the same steps
        changes nothing, and one with fewer goes back. The multipliers apply to the step that follows.
        """
        return Multipliers()

    def save(self, model: Any, folder: Path) -> None:
        """Write the weights of a model whose quantized layers were trained; its config is in the folder already.

        It is called only where the record says `trains`. The default writes the state dict as safetensors.
        """
        from safetensors.torch import save_model

        save_model(model, str(folder / QUANTIZED_FILE))

    def load(self, folder: Path, model: Any) -> Any:
        """Return the model that `save` wrote, given one of its config after `apply`, which may be filled in place."""
        from safetensors.torch import load_model

        load_model(model, folder / QUANTIZED_FILE, device=str(model.device))
        return model

    def state(self) -> dict[str, Any]:
        """Return all that a resume needs beyond the steps done, as tensors and JSON values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned."""
        del state  # the default has returned nothing
