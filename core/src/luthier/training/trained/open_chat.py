"""Opening a conversation with trained weights, and one with the model that they began from beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from luthier.artifacts.save import artifact_name
from luthier.errors import LuthierError
from luthier.hardware.devices import choose_device
from luthier.model import load
from luthier.model.generation.conversation import Conversation
from luthier.model.generation.generate import PromptForm
from luthier.plugins.structure import structure_value
from luthier.recipe.schema import Model
from luthier.step.opened import Opened
from luthier.training.trained.open_weights import open_weights
from luthier.training.trained.weights_place import find_weights


def open_chat(
    model: str | Path,
    *,
    base: str | None = None,
    system: str | None = None,
    device: str = "auto",
    step: int | None = None,
    best: bool = False,
) -> Conversation:
    """Return a conversation with the model at `model`, which is found as `generate` finds it.

    Its `ask(text)` answers in the run's chat template, after all that was said before.
    """
    opened = _opened(model, device, base, step, best)
    return _conversation(opened, system)


def open_chats(
    model: str | Path, *, base: str | None, system: str | None, device: str, step: int | None, best: bool
) -> dict[str, Conversation]:
    """Return two conversations, `base` and `tuned`, in the same template: the first is with the model as it was.

    An adapter is switched off for it; where a whole model was trained, the base model is read as well.
    Raises `artifact-not-found` where nothing says which one that is.
    """
    opened = _opened(model, device, base, step, best)
    tuned = _conversation(opened, system)
    if opened.adapter is not None and artifact_name(opened.adapter) == "adapter":
        before = Conversation(model=opened.model, tokenizer=opened.tokenizer, form=tuned.form, system=system,
                              around=opened.adapter.disabled)  # fmt: skip
        return {"base": before, "tuned": tuned}
    spec = _base_of(opened, str(model), base)
    plain: Any = load.load_model(spec, choose_device(device), {})
    return {
        "base": Conversation(model=plain.eval(), tokenizer=opened.tokenizer, form=tuned.form, system=system),
        "tuned": tuned,
    }


def _opened(model: str | Path, device: str, base: str | None, step: int | None, best: bool) -> Opened:
    chosen: torch.device = choose_device(device)
    return open_weights(find_weights(model, step=step, best=best), chosen, base)


def _conversation(opened: Opened, system: str | None) -> Conversation:
    form = PromptForm.of_note(opened.note)
    return Conversation(
        model=opened.model, tokenizer=opened.tokenizer, adapter=opened.adapter, form=form, system=system
    )


def _base_of(opened: Opened, path: str, base: str | None) -> Model:
    """Return the model that a whole model was trained from."""
    known = opened.note.get("model")
    if base is not None:
        return Model(name_or_path=base)
    if known is None:
        raise LuthierError("artifact-not-found", "nothing here says what it was trained from", where=path,
                           remedy="Name the base model with --base, or leave --compare out.")  # fmt: skip
    return structure_value(known, Model, path)
