"""Checks of exporters: their files are read back and compared, by a comparison that is shown to be able to fail."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError
from luthier.testing.laws import Subject, law


@law(0)
def reads_back_what_it_writes(subject: Subject) -> None:
    """`export` fills the folder, and `verify` returns finite differences to what it reads from there."""
    model, tokenizer = _world(subject)
    for options in _options(subject):
        with tempfile.TemporaryDirectory() as folder:
            exporter = subject.build(options)
            exporter.check(model.config)
            exporter.export(model, tokenizer, Path(folder))
            assert any(Path(folder).iterdir()), "nothing was written"
            differences = exporter.verify(model, tokenizer, Path(folder))
            assert differences, "verify names no difference: give the largest one, 0.0 included"
            bad = {name: value for name, value in differences.items() if not math.isfinite(float(value))}
            assert not bad, f"differences are finite numbers, not {bad}"


@law(0)
def refuses_a_folder_of_another_model(subject: Subject) -> None:
    """`verify` raises if the files hold another model's weights, so it really compares them."""
    import torch

    model, tokenizer = _world(subject)
    exporter = subject.build(subject.options_class())
    with tempfile.TemporaryDirectory() as folder:
        exporter.export(model, tokenizer, Path(folder))
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(-3.0).add_(1.0)
        try:
            exporter.verify(other, tokenizer, Path(folder))
        except LuthierError:
            return
    raise AssertionError("verify passes although every weight of the model is different")


@law(0)
def refuses_files_that_are_gone(subject: Subject) -> None:
    """`verify` raises for an empty folder, so it really reads the files."""
    model, tokenizer = _world(subject)
    exporter = subject.build(subject.options_class())
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as empty:
        exporter.export(model, tokenizer, Path(folder))
        try:
            exporter.verify(model, tokenizer, Path(empty))
        except (LuthierError, OSError):
            return
    raise AssertionError("verify passes for an empty folder")


@law(0)
def leaves_the_model_alone(subject: Subject) -> None:
    """Neither `export` nor `verify` changes a weight or the config."""
    import torch

    model, tokenizer = _world(subject)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with tempfile.TemporaryDirectory() as folder:
        live_in(subject, subject.options_class(), model, tokenizer, Path(folder))
    same = all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert same and model.state_dict().keys() == before.keys(), "the model's weights have changed"
    assert model.config.to_dict() == config, "the model's config has changed"


def live(subject: Subject, options: Any) -> None:
    """Check, write and compare with these options."""
    with tempfile.TemporaryDirectory() as folder:
        live_in(subject, options, *_world(subject), Path(folder))


def live_in(subject: Subject, options: Any, model: Any, tokenizer: Any, folder: Path) -> None:
    """Check, write and compare in a folder."""
    exporter = subject.build(options)
    exporter.check(model.config)
    exporter.export(model, tokenizer, folder)
    exporter.verify(model, tokenizer, folder)


def _options(subject: Subject) -> tuple[object, ...]:
    return (subject.options_class(), *subject.own_examples)


def _world(subject: Subject) -> tuple[Any, Any]:
    """Return a tiny model with its tokenizer, as a run's artifact gives them.

    For an exporter of quantized layers it is the author's own: `conformance(..., model=...)`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from luthier.testing.worlds import save_tiny_model, tiny_model, tiny_tokenizer

    if getattr(subject.record, "quantized", False):
        return tiny_model().eval(), tiny_tokenizer()
    with tempfile.TemporaryDirectory() as holder:
        folder = save_tiny_model(Path(holder) / "llama")
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
