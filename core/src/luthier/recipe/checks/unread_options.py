"""Unread options: settings that are given although nothing of the run reads them. They are refused with a remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.recipe.parts import Resolved
    from luthier.recipe.schema import Settings, Source

TEXT: Final = (".txt", ".text", ".md")  # files whose documents `text_unit` divides
TABLES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
HUB_ONLY: Final = ("split", "name", "revision")


@attrs.frozen
class Reader:
    """The condition under which an option is read, and what a recipe must have for it."""

    is_there: Callable[[Settings], bool]
    problem: str
    remedy: str


def _evaluates(recipe: Settings) -> bool:
    return recipe.data.validation != 0.0


NO_ROWS: Final = Reader(_evaluates, "there are no validation rows", "Set data.validation, or leave this out.")
READERS: Final[Mapping[str, Reader]] = {
    **dict.fromkeys(
        ("eval_steps", "eval_on_start", "max_eval_batches", "load_best_model_at_end",
         "metric_for_best_model", "greater_is_better"), NO_ROWS),
    **dict.fromkeys(("data.max_length", "data.overlong"), Reader(
        lambda recipe: recipe.data.block_size is None, "blocks are cut to block_size, however long a document is",
        "Leave it out, or block_size.")),
    "data.shuffle_buffer": Reader(
        lambda recipe: recipe.data.streaming, "rows that do not stream are shuffled all at once",
        "Set data.streaming: true, or leave this out."),
    "data.text_unit": Reader(
        lambda recipe: any(_may_be_text(source) for source in _all_sources(recipe)), "no source is a plain text file",
        f"It divides {', '.join(TEXT)} files; leave it out."),
    "pure_bf16_update": Reader(
        lambda recipe: recipe.precision == "pure_bf16", "only pure_bf16 updates weights without a float32 copy",
        "Set precision: pure_bf16, or leave this out."),
    "max_eval_answers": Reader(
        lambda recipe: bool(recipe.metrics), "no metric reads generated answers",
        "Name one in metrics, or leave this out."),
}  # fmt: skip


def check_unread(recipe: Settings) -> None:
    """Raise `recipe-conflict` for an option that is not at its default although nothing reads it."""
    for name, reader in READERS.items():
        owner, field = _owner(recipe, name)
        if getattr(owner, field) != default_value(type(owner), field) and not reader.is_there(recipe):
            raise LuthierError("recipe-conflict", f"nothing reads it: {reader.problem}", where=name,
                               found=getattr(owner, field), remedy=reader.remedy)  # fmt: skip
    _check_sources(recipe)


def check_unread_by_parts(recipe: Settings, resolved: Resolved) -> None:
    """Raise `recipe-conflict` if the chosen adapter makes a setting of the saved files meaningless."""
    adapter, quantizer = (part.record or part.local for part in (resolved.adapter, resolved.quantizer))
    is_model = getattr(adapter, "artifact", "adapter") == "model"
    dense = resolved.quantizer.name == "none"
    if recipe.merge and is_model and dense:
        problem = f"nothing reads it: adapter {resolved.adapter.name!r} writes the whole model as it is"
        remedy = "Leave it out; the model is in the folder `model` of the run."
        raise LuthierError("recipe-conflict", problem, where="merge", found=True, remedy=remedy)
    writes = (is_model and dense) or all(getattr(part, "mergeable", True) for part in (adapter, quantizer))
    for name in ("max_shard_size", "save_dtype"):
        if not writes and getattr(recipe, name) != default_value(type(recipe), name):
            problem = "nothing reads it: no dense model is written, and none can be made of the artifact"
            raise LuthierError("recipe-conflict", problem, where=name, found=getattr(recipe, name),
                               remedy="Leave it out.")  # fmt: skip


def default_value(cls: type, name: str) -> Any:
    """Return the default of an options class's field."""
    default: Any = attrs.fields_dict(cls)[name].default
    return default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]


def _owner(recipe: Settings, name: str) -> tuple[Any, str]:
    above, _, field = name.rpartition(".")
    return (getattr(recipe, above) if above else recipe), field


def _all_sources(recipe: Settings) -> list[Source]:
    return [*recipe.data.train, *(recipe.data.validation if isinstance(recipe.data.validation, list) else ())]


def _check_sources(recipe: Settings) -> None:
    """Raise `recipe-conflict` for a file with a setting of hub datasets, and for a weight without another source."""
    lists = {"data.train": recipe.data.train, "data.validation": recipe.data.validation}
    for where, sources in lists.items():
        for number, source in enumerate(sources if isinstance(sources, list) else ()):
            for name in HUB_ONLY:
                value = getattr(source, name)
                if _kind(source) in (*TABLES, *TEXT) and value != default_value(type(source), name):
                    problem = f"nothing reads it: {source.path} is a file, and only datasets of the hub have a {name}"
                    raise LuthierError("recipe-conflict", problem, where=f"{where}.{number}.{name}", found=value,
                                       remedy="Leave it out.")  # fmt: skip
        if isinstance(sources, list) and len(sources) == 1 and sources[0].weight != 1.0:
            problem = "it changes nothing: rows are weighed against those of other sources, and there are none"
            raise LuthierError("recipe-conflict", problem, where=f"{where}.0.weight", found=sources[0].weight,
                               remedy="Leave it out.")  # fmt: skip


def _may_be_text(source: Source) -> bool:
    """Return True if a source may hold plain text: a text file, or a source whose name does not say what it holds."""
    return _kind(source) not in TABLES and not source.path.startswith("python:")


def _kind(source: Source) -> str:
    if "://" in source.path:
        return ""
    path = Path(source.path)
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()
