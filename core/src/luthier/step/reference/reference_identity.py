"""The identity of cached log-probabilities: of which weights, data and template they are."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from luthier.model.weights import fingerprint
from luthier.recipe.schema import OtherModel

if TYPE_CHECKING:
    from luthier.step.setup import Setup


def identify_reference(setup: Setup) -> dict[str, Any]:
    """Return what decides a reference's log-probabilities, under the words that an error names it by."""
    settings = setup.recipe.to_dict()
    other = setup.recipe.reference
    named = other.model if isinstance(other, OtherModel) else setup.recipe.model
    sets = [setup.train, setup.validation]
    template = getattr(setup.tokenizer, "chat_template", None)
    return {
        "weights": [fingerprint.of_model(named.name_or_path), settings["model"], settings["reference"],
                    settings["adapter"], settings["adapter_from"], settings["quantizer"], settings["seed"]],
        "data": [None if dataset is None else dataset.fingerprint for dataset in sets],
        "template": hashlib.blake2b(str(template).encode()).hexdigest()[:32],
    }  # fmt: skip
