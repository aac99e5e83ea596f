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
    settings, other = setup.recipe.to_dict(), setup.recipe.reference
    named = other.model if isinstance(other, OtherModel) else setup.recipe.model
    return {
        "weights": [fingerprint.of_model(named.name_or_path), settings["model"], settings["reference"],
                    settings["adapter"], settings["adapter_from"], settings["quantizer"], settings["seed"]],
        **_identify_rows(setup),
    }  # fmt: skip


def identify_teacher(setup: Setup) -> dict[str, Any]:
    """Return what decides a teacher's distributions, in the same way."""
    teacher = setup.recipe.teacher
    assert isinstance(teacher, OtherModel), "a part needs a teacher"
    weights = [fingerprint.of_model(teacher.model.name_or_path), setup.recipe.to_dict()["teacher"]]
    return {"weights": weights, **_identify_rows(setup)}


def _identify_rows(setup: Setup) -> dict[str, Any]:
    sets = [setup.train, setup.validation]
    template = getattr(setup.tokenizer, "chat_template", None)
    return {
        "data": [None if dataset is None else dataset.fingerprint for dataset in sets],
        "template": hashlib.blake2b(str(template).encode()).hexdigest()[:32],
    }
