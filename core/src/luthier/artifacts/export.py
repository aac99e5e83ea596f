"""Export: a trained model in the format of another tool, written by an exporter, read back and compared."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from luthier.artifacts.dense_copy import merged_copy
from luthier.artifacts.model_card import put_card
from luthier.artifacts.save import check_mergeable, portable_model
from luthier.errors import LuthierError, unwritable_path
from luthier.logs import get_logger
from luthier.plugins.contracts.protocols import Exporter
from luthier.plugins.registry import installed_plugins
from luthier.recipe.parts import find_part
from luthier.step.opened import Opened

log = get_logger()


@attrs.frozen(kw_only=True)
class Export:
    """The result of an export, or of a dry run: folder, format and its plugin, files with bytes, differences."""

    folder: Path
    format: str
    distribution: str | None
    files: dict[str, int] = attrs.field(factory=dict)
    differences: dict[str, float] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Exportable:
    """A trained model to export: a folder beside it by name, its config, and then the model itself."""

    beside: Callable[[str], Path]
    read_config: Callable[[], Any]
    open_model: Callable[[], Opened]


def export_model(
    chosen: str | Mapping[str, Any],
    source: Exportable,
    folder: Path | None = None,
    *,
    dry_run: bool = False,
) -> Export:
    """Write a complete model in another tool's format.

    Its weights are plain, unless the format is for quantized layers (`ExporterRecord.quantized`). `chosen` is the
    exporter's name, or `{name: ..., options}`. `folder` None means one beside the model, named after the format.
    Everything that can be refused is refused before the weights are read; `dry_run` ends there. Nothing remains of an
    export that fails the exporter's own comparison.
    """
    part = find_part(chosen, "exporter", "format", installed_plugins())
    exporter: Exporter = installed_plugins().build(part.offer, part.options) if part.offer else part.local
    folder = folder or source.beside(part.name)
    _check_free(folder)
    exporter.check(source.read_config())
    export = Export(folder=folder, format=part.name, distribution=part.source.distribution if part.source else None)
    if dry_run:
        return export
    opened = source.open_model()
    as_trained = getattr(exporter, "quantized", False)
    model, tokenizer = (opened.model, opened.tokenizer) if as_trained else plain_model(opened)
    tokenizer = _as_prompted(tokenizer, opened.note)
    differences = _write(exporter, model, tokenizer, folder, opened.note)
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    log.info("exported", folder=str(folder), format=part.name, differences=differences)
    return attrs.evolve(export, files=files, differences=differences)


def read_config(artifact: Path, base: str | None) -> Any:
    """Return the transformers config of the artifact at a path, or of the base that an adapter was trained on."""
    from luthier.model.load import load_config
    from luthier.model.model_config import config_of
    from luthier.plugins.structure import structure_value
    from luthier.recipe.schema import Model
    from luthier.step.opened import read_opened_note

    if (artifact / "config.json").is_file():
        return load_config(str(artifact), code="artifact-not-found")
    note = read_opened_note(artifact)
    spec = (
        structure_value(note["model"], Model, str(artifact)) if "model" in note else Model(name_or_path=str(artifact))
    )
    return config_of(spec if base is None else attrs.evolve(spec, name_or_path=base))


def plain_model(opened: Opened) -> tuple[Any, Any]:
    """Return the model with the adapter merged and with plain weights, and its tokenizer."""
    try:
        check_mergeable(opened.adapter, opened.quantizer, opened.note)
    except LuthierError as error:
        formats = [
            o.record.name for o in installed_plugins().offers("exporter") if getattr(o.record, "quantized", False)
        ]
        remedy = f"Formats that take a quantizer's layers as trained: {', '.join(formats) or 'none is installed'}."
        raise LuthierError(error.code, error.problem, where=error.where or "format", remedy=remedy) from None
    if opened.quantizer is None:
        return opened.model, opened.tokenizer
    return merged_copy(opened.model, opened.adapter, opened.quantizer), opened.tokenizer


def _as_prompted(tokenizer: Any, note: Mapping[str, Any]) -> Any:
    """Return the tokenizer as the model's prompts were made: without a chat template where they were plain texts."""
    if note.get("prompts") != "plain" or tokenizer.chat_template is None:
        return tokenizer
    log.info("no chat template in the export", because="the run was trained on plain prompts")
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = None
    return tokenizer


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LuthierError("path-unwritable", "this path exists already", where=str(folder),
                           remedy="Choose another --output-dir, or remove it.")  # fmt: skip


def _write(exporter: Exporter, model: Any, tokenizer: Any, folder: Path, note: Mapping[str, Any]) -> dict[str, float]:
    """Write beside the final path, compare, and rename. Return the differences."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise unwritable_path(folder, error) from None
    try:
        with portable_model(model):
            exporter.export(model, tokenizer, aside)
            if not any(aside.iterdir()):
                raise LuthierError("artifact-mismatch", "the exporter wrote nothing", where=str(folder))
            differences = dict(exporter.verify(model, tokenizer, aside))
        if note:
            put_card(aside, folder, note)
        if folder.exists():
            folder.rmdir()
        aside.chmod(0o755)
        aside.rename(folder)
    except OSError as error:
        raise unwritable_path(folder, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {name: float(value) for name, value in differences.items()}
