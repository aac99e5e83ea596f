"""Paths and `${VARIABLES}` in recipes: which text is a path, what it is relative to, and how a dollar is written."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs

from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins.fields.hints import field_hints
from luthier.plugins.structure import Written, place_error

if TYPE_CHECKING:
    from luthier.recipe.schema import Data, Model, Settings, Source

Made = TypeVar("Made", bound="Settings")  # settings, or a recipe
VARIABLE: Final = re.compile(r"(\$+)\{([A-Za-z_][A-Za-z0-9_]*)\}")
HUB: Final = re.compile(r"[\w.\-]+(/[\w.\-]+)?")
SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")  # two letters or more, because one letter is a drive
FILES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".text", ".md", ".gz")

BaseOf = Callable[[tuple[str, ...]], Path | None]


def expand_variables(value: Any, environ: Mapping[str, str]) -> Any:
    """Return plain data with `${NAME}` in every text replaced from the environment. `$${NAME}` stands for `${NAME}`."""
    if isinstance(value, str):
        return VARIABLE.sub(lambda match: _expansion(match, environ), value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Written):
        return Written(expand_variables(value.text, environ), expand_variables(value.value, environ))
    return _through(value, lambda child: expand_variables(child, environ))


def escape_variables(value: Any) -> Any:
    """Return plain data with its dollars escaped, so that `expand_variables` returns the original data."""
    if isinstance(value, str):
        return VARIABLE.sub(lambda match: f"${match[0]}", value)
    return _through(value, escape_variables)


def _expansion(match: re.Match[str], environ: Mapping[str, str]) -> str:
    dollars, name = match.groups()
    if len(dollars) > 1:
        return match[0][1:]
    if name not in environ:
        close = suggest_nearest(name, environ)
        remedy = f"Set it. {close}" if close.startswith("Did") else "Set it, or write the value itself."
        raise LuthierError("recipe-missing", f"the environment variable {name} is not set", remedy=remedy)
    return environ[name]


def _through(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a copy of a mapping or list with every item changed. An error names the item's path."""
    if isinstance(value, Mapping):
        return {key: _inside(child, change, str(key)) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_inside(child, change, str(i)) for i, child in enumerate(value)]
    return value


def _inside(value: Any, change: Callable[[Any], Any], place: str) -> Any:
    try:
        return change(value)
    except LuthierError as error:
        raise place_error(error, place) from None


def locate_paths(recipe: Made, base_of: BaseOf = lambda _: Path.cwd()) -> Made:
    """Return the recipe with relative paths joined to `base_of(path of the option)`; None leaves a path unchanged."""
    changes: dict[str, Any] = {"model": _model(recipe.model, ("model",), base_of), "data": _data(recipe.data, base_of)}
    base = base_of(("output_dir",))
    if base and recipe.output_dir is not None:
        changes["output_dir"] = _joined(base, recipe.output_dir)
    begun = base_of(("adapter_from",))
    if begun and recipe.adapter_from is not None:
        changes["adapter_from"] = _joined(begun, recipe.adapter_from)
    for name in ("reference", "teacher"):
        changes[name] = _other_model(getattr(recipe, name), name, base_of)
    for name in ("adapter", "loss", "optimizer", "quantizer", "provider"):
        changes[name] = _options(getattr(recipe, name), (name,), base_of)
    changes["callbacks"] = [_options(c, ("callbacks", str(i)), base_of) for i, c in enumerate(recipe.callbacks)]
    return attrs.evolve(recipe, **changes)


def _other_model(other: Any, name: str, base_of: BaseOf) -> Any:
    """Return a teacher or reference with its paths joined; a word that stands for one unchanged."""
    if other is None or isinstance(other, str):
        return other
    base = base_of((name, "adapter"))
    changes: dict[str, Any] = {"model": _model(other.model, (name, "model"), base_of)}
    if base and other.adapter is not None:
        changes["adapter"] = _joined(base, other.adapter)
    return attrs.evolve(other, **changes)


def _model(model: Model, steps: tuple[str, ...], base_of: BaseOf) -> Model:
    texts = {name: getattr(model, name) for name in ("name_or_path", "tokenizer")}
    changes: dict[str, Any] = {
        name: _joined(base, text)
        for name, text in texts.items()
        if text and (base := base_of((*steps, name))) and _is_folder(base, text)
    }
    return attrs.evolve(model, **changes)


def _is_folder(base: Path, text: str) -> bool:
    """Return True if a model is a folder and not a hub name. `demo` is always the embedded model."""
    return _is_marked(text) or (text != "demo" and (base / text).is_dir())


def _data(data: Data, base_of: BaseOf) -> Data:
    changes: dict[str, Any] = {"train": _sources(data.train, "train", base_of)}
    if isinstance(data.validation, list):
        changes["validation"] = _sources(data.validation, "validation", base_of)
    base, template = base_of(("data", "chat_template")), data.chat_template
    if base and template and "{" not in template and "\n" not in template:
        changes["chat_template"] = _joined(base, template)
    return attrs.evolve(data, **changes)


def _sources(sources: list[Source], name: str, base_of: BaseOf) -> list[Source]:
    bases = [base_of(("data", name, str(i), "path")) for i in range(len(sources))]
    return [
        attrs.evolve(s, path=_joined(b, s.path)) if b and _is_file(b, s.path) else s
        for s, b in zip(sources, bases, strict=True)
    ]


def _options(options: Any, steps: tuple[str, ...], base_of: BaseOf) -> Any:
    """Return a part's options with the paths among them joined; a part without options object unchanged."""
    if not attrs.has(type(options)):
        return options
    cls: type = type(options)
    known = field_hints(cls)
    changes = {
        f.alias: Path(_joined(base, str(value)))
        for f in attrs.fields(type(options))
        if isinstance(value := getattr(options, f.name), Path) and f.name in known and f.init
        if (base := base_of((*steps, f.name)))
    }
    return attrs.evolve(options, **changes) if changes else options


def _is_file(base: Path, text: str) -> bool:
    """Return True if a source is a file or glob and not a hub dataset, by its mark or suffix, or because it exists."""
    if SCHEME.match(text):  # hf://..., or python:list for an object of the caller
        return False
    suffixed = text.lower().endswith(FILES) or glob.has_magic(text)
    return suffixed or _is_marked(text) or not HUB.fullmatch(text) or (base / text).exists()


def _is_marked(text: str) -> bool:
    return text in (".", "..") or text.startswith(("./", "../", "~", "/", ".\\", "..\\"))


def _joined(base: Path, text: str) -> str:
    return os.path.abspath(os.path.join(base, os.path.expanduser(text)))
