"""Facts that a model's config alone gives: its shapes as a model without data, and its number of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from luthier.model import load

if TYPE_CHECKING:
    from luthier.recipe.schema import Model


def config_of(spec: Model) -> Any:
    """Return the config of a named model. Nothing else of the model is read. Raises `model-not-found`."""
    name = load.model_location(spec.name_or_path)
    return load.load_config(name, load.revision_of(spec, name))


def build_model(config: Any, spec: Model, device: torch.device) -> Any:
    """Return the causal LM of a config, in the dtype that loading would give it; within `Ghosts` it has no data."""
    import transformers

    stored = getattr(config, "dtype", None) or torch.float32
    dtype = stored if spec.dtype == "auto" else getattr(torch, spec.dtype)
    with load.quiet(), device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.published_in = stored  # weights without data do not show this dtype
    return model


def experts_of(config: Any) -> int:
    """Experts of a sparse layer, 1 where the model has none."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    text = config.get_text_config()
    return next((int(count) for name in names if (count := getattr(text, name, None))), 1)
