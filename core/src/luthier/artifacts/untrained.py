"""The artifact of an untrained model: written, read back and compared before the first step, and thrown away."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from luthier.artifacts.dense_copy import make_dense
from luthier.artifacts.note import Prompting, make_note
from luthier.artifacts.save import artifact_name, portable_model, save_adapter
from luthier.artifacts.verify import check_model, gives_numbers
from luthier.data.examples import TokenDataset
from luthier.errors import LuthierError
from luthier.logs import get_logger, muted_logs
from luthier.model.foreign import describe_error
from luthier.model.weights.dense_files import Files, save_model
from luthier.model.weights.sampled.sampled_files import check_sample
from luthier.model.weights.sampled.sampled_state import sampled_state
from luthier.plugins.contracts.protocols import Adapter, Quantizer
from luthier.plugins.contracts.values import Progress
from luthier.randomness import keep_randomness
from luthier.recipe import Recipe
from luthier.recipe.parts import Resolved
from luthier.step.attachment import Attachment
from luthier.step.opened import names_everything
from luthier.step.preparation import keep_decisions
from luthier.step.schedule.total_steps import feed_of

log = get_logger()
SMALL: Final = 1 << 30  # bytes of a model that is read a second time, which takes a second or two
NOISE: Final = 1e-2  # added to trained weights, as many begin at zero, where no option of an adapter shows
# entries of a note that do not decide what an artifact holds
VARYING: Final = ("run_id", "card", "seed", "parts", "progress")
CODE: Final = "artifact-uncarried"

_checked: set[str] = set()  # what this process has found to be carried


def check_artifact(recipe: Recipe, resolved: Resolved, attachment: Attachment, model: Any) -> None:
    """Raise on every rank what rank 0 finds where the untrained model is written and read back."""
    parts = attachment.parts

    def check() -> None:
        files = Files.of_recipe(recipe, model.dtype, getattr(parts.adapter, "save_dtype", None))
        described = [part.describe() for part in resolved]
        note = make_note(recipe.to_dict(), "untrained", described, Prompting.of_rows(attachment.prepared), files)
        note["decisions"] = keep_decisions(attachment.decisions)
        end = _last_progress(attachment)
        note["progress"] = attrs.asdict(end)
        mergeable = all(getattr(part, "mergeable", True) for part in (parts.adapter, parts.quantizer))
        merges = recipe.merge is True and mergeable  # else refused in a moment, by the part's name
        try:
            parts.quantizer.progressed(end)  # its layers compute as they will when the artifact is written
            check_untrained(model, parts.adapter, parts.quantizer, attachment.tokenizer, note, merges=merges)
        finally:
            parts.quantizer.progressed(attrs.evolve(end, step=0, epoch=0.0))

    attachment.world.decide(check)


def _last_progress(attachment: Attachment) -> Progress:
    """Return the position at the end of the run, or at its beginning if the end is not known."""
    recipe, train = attachment.recipe, attachment.prepared.train
    total = feed_of(recipe, train).total
    if total is None:
        return Progress(step=0, total_steps=None, epoch=0.0)
    epoch = total * recipe.global_batch_size / len(train) if isinstance(train, TokenDataset) else 0.0
    return Progress(step=total, total_steps=total, epoch=epoch)


def check_untrained(
    model: Any, adapter: Adapter, quantizer: Quantizer, tokenizer: Any, note: dict[str, Any], *, merges: bool
) -> None:
    """Raise `artifact-uncarried` if what is to be trained could not be saved and read back as it is.

    The artifact goes to a temporary folder. Up to SMALL bytes, a fresh base must have the same logits with it. A larger
    model's adapter is read back into the attached one; of a larger whole model a sample is written, unless a quantizer
    writes it. Trained weights carry noise meanwhile; afterwards they are as before, to the bit. What this process has
    checked is not checked again.
    """
    small = sum(p.numel() * p.element_size() for p in model.parameters()) <= SMALL
    whole = artifact_name(adapter) == "model"
    key = _key(note, model, tokenizer, merges=merges)
    if key in _checked or (whole and not small and quantizer.trains) or (small and not gives_numbers(model, adapter)):
        return  # without numbers nothing can be compared, and the layer that gives none is named in a moment
    try:
        with keep_randomness(), muted_logs(), tempfile.TemporaryDirectory(prefix="luthier-untrained-") as folder:
            place = Path(folder) / artifact_name(adapter)
            if small:
                _write_small(model, adapter, quantizer, tokenizer, note, place)
            elif whole:
                _write_sample(model, adapter, place)
            else:
                _read_back(adapter, place)
            if small and merges:
                _merge(model, adapter, quantizer, Path(folder) / "merged")
    except torch.OutOfMemoryError:
        log.warning("the untrained artifact is not checked", because="the device has no room for a second model")
        return
    _checked.update({key} - {""})


def _key(note: Mapping[str, Any], model: Any, tokenizer: Any, *, merges: bool) -> str:
    """Return what decides whether an artifact carries everything; empty where an object of Python takes part."""
    if note.get("base") is None or not names_everything(note):
        return ""
    named = {**note["model"], "name_or_path": None}
    known = {**{name: value for name, value in note.items() if name not in VARYING}, "model": named, "merges": merges}
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return json.dumps([known, config, type(model).__name__, type(tokenizer).__name__, len(tokenizer)], default=str)


def _write_small(
    model: Any, adapter: Adapter, quantizer: Quantizer, tokenizer: Any, note: dict[str, Any], place: Path
) -> None:
    is_adapter = artifact_name(adapter) == "adapter"
    with _explained("adapter", place), _noisy(adapter, on=is_adapter):
        save_adapter(model, tokenizer, adapter, place, note, quantizer)


def _write_sample(model: Any, adapter: Adapter, place: Path) -> None:
    """Write what a large model's files say of it and a few of its weights, and compare them with the model."""
    with _explained("adapter", place), sampled_state() as names, portable_model(model):
        place.mkdir()
        adapter.save(place)
        if names:  # else the adapter has written the whole model by its own means
            check_sample(model, place, names)


def _read_back(adapter: Adapter, place: Path) -> None:
    """Save the adapter, and read it back into the attached one, whose weights are others meanwhile."""
    with _explained("adapter", place), _noisy(adapter, on=True):
        place.mkdir()
        before = _tensors(adapter)
        adapter.save(place)
        with torch.no_grad():
            for parameter in _parameters(adapter):
                parameter.zero_()
        adapter.load(place)
        _compare_states(before, _tensors(adapter))


def _compare_states(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Raise `artifact-mismatch` for the first tensor that has another name, shape, dtype or other numbers."""
    for name in sorted({*before, *after}):
        own, other = before.get(name), after.get(name)
        if own is None or other is None:
            problem = "is not in the files" if other is None else "is in the files alone"
        elif (own.shape, own.dtype) != (other.shape, other.dtype):
            problem = f"is {list(own.shape)} {own.dtype}, and read back {list(other.shape)} {other.dtype}"
        elif not torch.allclose(own.float(), other.float(), rtol=1e-2, atol=1e-6, equal_nan=True):
            problem = "has other numbers when it is read back"
        else:
            continue
        raise LuthierError("artifact-mismatch", f"{name} {problem}")


def _merge(model: Any, adapter: Adapter, quantizer: Quantizer, place: Path) -> None:
    with _explained("merge", place), _noisy(adapter, on=artifact_name(adapter) == "adapter"):
        dense = make_dense(model, adapter, quantizer).model
        with portable_model(dense):
            save_model(dense, place, Files(dtype=torch.float32))
        check_model(model, place, adapter)


@contextmanager
def _explained(option: str, place: Path) -> Iterator[None]:
    """Raise, with the option's name, whatever says that something cannot be saved and read back as it is."""
    try:
        yield
    except (torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # of parts and libraries, which have no common class of errors
        known = isinstance(error, LuthierError)
        problem = error.problem if isinstance(error, LuthierError) else describe_error(error)
        if isinstance(error, LuthierError) and error.code != "artifact-mismatch":
            moved = error.relocated(lambda where: option if where is None or str(place.parent) in where else where)
            raise moved from error
        found = f"written, untrained, and read back, it is another: {problem}" if known else problem
        raise LuthierError(CODE, found, where=option) from error


@contextmanager
def _noisy(adapter: Adapter, *, on: bool) -> Iterator[None]:
    """Add noise to the trained weights within this context; afterwards they are as they were."""
    parameters = _parameters(adapter) if on else []
    came = [parameter.detach().clone() for parameter in parameters]
    random = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=random).to(parameter) * NOISE)
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, came, strict=True):
                parameter.copy_(before)


def _parameters(adapter: Adapter) -> list[Tensor]:
    every = (parameter for group in adapter.groups() for parameter in group.parameters)
    return [parameter for parameter in every if parameter.is_floating_point()]


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in adapter.state().items() if isinstance(value, Tensor)}
