"""A first recipe: what the rows of a file suggest, and the text of a recipe that trains on them."""

from __future__ import annotations

import json
import os
import re
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from luthier.errors import LuthierError, suggest_nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from luthier.plugins.registry import Plugins

SCHEMA: Final = "luthier.schema.json"
SAMPLE: Final = 200  # the number of rows that are read
FEW: Final = 20  # the number of rows below which none is held out
# the loss to propose if the installed parts give no better reason
SUGGESTED: Final = {"preference": "dpo", "unpaired": "kto"}
STARTING: Final = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}  # starting options of low-rank adapters
COLUMN: Final = 32  # the column where comments begin
PLAIN: Final = re.compile(r"[\w./\-]+")
GIB: Final = 2**30
GIBIBYTES: Final = r"\d+(\.\d+)?"
TOKENS: Final = 4096  # tokens of a micro-batch, for which memory is predicted


@attrs.frozen(kw_only=True)
class Look:
    """The format, the kind and the number of a source's first rows.

    `columns` maps the names that a format needs to the data's own names.
    """

    format: str
    kind: str  # the kind of losses that take such rows
    rows: int  # at most SAMPLE
    columns: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Answers:
    """The four answers: model, data, method and place."""

    model: str
    data: str
    method: str
    where: str


def look_at_rows(path: str) -> Look | None:
    """Return what a source's first rows show; None for a hub dataset, which is not fetched for this.

    Raises `data-not-found`, and `data-format` if no format fits and no columns look like question and answer.
    """
    from luthier.data.formats.recognise_form import ANSWERS, FORMATS, QUESTIONS, recognise_format
    from luthier.data.read.sources import find_files, read_source
    from luthier.recipe.schema import Source

    if not find_files(path):
        return None
    rows = list(islice(read_source(Source(path=path)), SAMPLE))
    columns: dict[str, str] = {}
    try:
        form = recognise_format(rows, path, kind="any")
    except LuthierError:
        names = {name for row in rows for name in row.values}
        ask, tell = (next((name for name in known if name in names), None) for known in (QUESTIONS, ANSWERS))
        if not (ask and tell):
            raise
        form, columns = "prompt_completion", {"prompt": ask, "completion": tell}
    return Look(format=form, kind=FORMATS[form].kind, rows=len(rows), columns=columns)


def find_rows() -> str:
    """Return the only file of rows in the working folder, or the rows of the embedded model."""
    from luthier.data.read.sources import READERS, file_kind
    from luthier.demo import MODEL

    files = [path for path in Path().iterdir() if path.is_file() and path.name != SCHEMA]
    own = [path.name for path in files if file_kind(path) in READERS and _holds_rows(path.name)]
    return own[0] if len(own) == 1 else str(MODEL.parent / "train.jsonl.gz")


def _holds_rows(path: str) -> bool:
    """Return True if a file has rows of a known format, which a `package.json` does not."""
    try:
        return look_at_rows(path) is not None
    except LuthierError:
        return False


def list_methods(kind: str, plugins: Plugins) -> list[str]:
    """Return the adapters, and the losses that take rows of this kind. The one to propose comes first."""
    from luthier.recipe.reading.aliases import QUANTIZED

    adapters = [offer.record.name for offer in plugins.offers("adapter") if "." not in offer.record.name]
    adapters += [name for name, meant in QUANTIZED.items() if meant in adapters]
    losses = [offer.record.name for offer in plugins.offers("loss") if getattr(offer.record, "data", "") == kind]
    usual = [SUGGESTED[kind]] if kind in SUGGESTED else [name for name in ("lora", "full") if name in adapters]
    return list(dict.fromkeys([*usual, *losses, *(adapters if kind == "tokens" else [])]))


def settle_method(method: str, look: Look | None, plugins: Plugins) -> dict[str, Any]:
    """Return the settings `adapter` and `loss` that a method means, which is the name of an adapter or a loss.

    Raises `part-unknown` for another name, and `data-format` for a loss that takes other rows.
    """
    from luthier.recipe.reading.aliases import QUANTIZED

    kind = look.kind if look else "tokens"
    names = {k: {offer.record.name for offer in plugins.offers(k)} for k in ("adapter", "loss")}
    if method in names["adapter"] or QUANTIZED.get(method) in names["adapter"]:
        adapter, loss = method, SUGGESTED.get(kind, "sft")
    elif method in {*names["loss"], *SUGGESTED.values()}:
        adapter, loss = ("lora" if "lora" in names["adapter"] else "full"), method
    else:
        known = [*QUANTIZED, *names["adapter"], *names["loss"]]
        raise LuthierError("part-unknown", f"no installed adapter or loss is called {method!r}", where="--method",
                           remedy=suggest_nearest(method, known))  # fmt: skip
    wanted = getattr(plugins.get("loss", loss).record, "data", "tokens")
    if look and wanted not in (kind, "documents") and not (wanted == "unpaired" and kind == "tokens"):
        problem = f"the loss {loss} takes {wanted} rows, but these are {look.format}"
        remedy = f"Choose one of: {', '.join(list_methods(kind, plugins))}."
        raise LuthierError("data-format", problem, where="--method", found=method, remedy=remedy)
    return {"adapter": _with_options(adapter, plugins), "loss": loss}


def _with_options(adapter: str, plugins: Plugins) -> Any:
    """Return an adapter with those of the starting options that it has."""
    from luthier.recipe.reading.aliases import QUANTIZED

    cls = plugins.get("adapter", QUANTIZED.get(adapter, adapter)).record.options
    own = {} if isinstance(cls, str) else {f.alias for f in attrs.fields(cls)}
    options = {name: value for name, value in STARTING.items() if name in own}
    return {"name": adapter, **options} if options else adapter


def settle_place(where: str, answers_model: str, adapter: Any, plugins: Plugins) -> dict[str, Any]:
    """Return the settings for a place: `here`, a provider, or a device with so many GiB of memory."""
    if where in ("here", "local"):
        return {}
    if re.fullmatch(GIBIBYTES, where):
        return _fit_memory(float(where) * GIB, answers_model, adapter)
    try:
        return {"provider": plugins.get("provider", where).record.name}
    except LuthierError as error:
        raise error.at("--where") from None


def _fit_memory(memory: float, model: str, adapter: Any) -> dict[str, Any]:
    """Return the settings of the first known way to train the model that fits, or else of the smallest."""
    from luthier.memory.model_presets import METHODS

    needs = _list_needs(model, adapter)
    if not needs:
        return {}
    way = next((way for way, need in needs.items() if need <= memory), [*needs][-1])
    return {name: value for name, value in METHODS[way].items() if name != "adapter"}


def _list_needs(model: str, adapter: Any) -> dict[str, int]:
    """Return the known ways to train a well-known model with an adapter, with their bytes; an empty dict for others."""
    from luthier.memory.model_presets import METHODS, list_presets

    family = "full" if adapter == "full" else "lora"
    ways = [name for name in METHODS if name.partition(",")[0] == family]
    presets = [preset for preset in list_presets() if preset.name == model]
    return {way: preset.needs(way, TOKENS) for preset in presets for way in ways}


def describe_memory(answers: Answers, adapter: Any) -> str | None:
    """Return a remark on a device whose memory was given: that nothing known fits, or that this is not known."""
    if not re.fullmatch(GIBIBYTES, answers.where):
        return None
    needs = _list_needs(answers.model, adapter)
    if not needs:
        return f"Whether {answers.model} fits in {answers.where} GiB is not known here; `luthier plan` predicts it."
    least = min(needs.values())
    if least <= float(answers.where) * GIB:
        return None
    return f"{answers.model} needs about {least / GIB:.0f} GiB this way, but the device has {answers.where}."


def recipe_text(path: Path, answers: Answers, look: Look | None, settings: Mapping[str, Any]) -> str:
    """Return the recipe as YAML with comments, checked as if it were read from this path."""
    from luthier.recipe import from_mapping
    from luthier.recipe.reading.yaml12 import load_yaml

    lines = [*_lines(path, answers, look, settings)]
    head = f"# yaml-language-server: $schema={SCHEMA}\n# `luthier train --help` has every setting, options.md too.\n"
    body = "".join(f"{line.ljust(COLUMN)}  # {comment}\n" if comment else f"{line}\n" for line, comment in lines)
    from_mapping(load_yaml(body, str(path))[0], base=path.absolute().parent)
    return head + body


def _lines(path: Path, answers: Answers, look: Look | None, settings: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    source = f"path: {_scalar(_near(answers.data, path, exists=_is_here(answers.data)))}"
    if look and look.columns:
        source += f", columns: {_flow(look.columns)}"
    seen = f"{look.rows}{' or more' if look.rows == SAMPLE else ''} rows, recognised as {look.format}" if look else ""
    known = settings.get("model.dtype")
    name = _model_near(answers.model, path)
    model = _flow({"name_or_path": name, "dtype": known}) if known else _scalar(name)
    few = look is not None and look.rows < SAMPLE
    enough_rows = look is None or look.rows >= FEW
    rest = [(name, value) for name, value in settings.items() if name not in ("adapter", "loss", "model.dtype")]
    return [
        (f"model: {model}", "a hub name, a folder, or demo, the embedded model"),
        ("data:", ""),
        (f"  train: [{{{source}}}]", seen),
        *([("  validation: 0.05", "this share of the rows is held out and evaluated")] if enough_rows else []),
        ("  max_length: 1024", "tokens of the longest example"),
        (f"adapter: {_flow(settings['adapter'])}", "what trains: full is every weight"),
        (f"loss: {_scalar(settings['loss'])}", "what is minimised"),
        ("learning_rate: auto", "by the size of the model and the share that trains"),
        ("lr_scheduler_type: cosine", ""),
        ("warmup_ratio: 0.05", ""),
        (f"num_train_epochs: {3 if few else 1}", "passes over the rows"),
        ("global_batch_size: auto", "examples of one step, by the number of rows"),
        *((f"{name}: {_scalar(value)}", "") for name, value in rest),
        (f"output_dir: {_scalar(f'runs/{path.stem}')}", "the run's folder, beside this file"),
    ]  # fmt: skip


def _near(place: str, path: Path, *, exists: bool) -> str:
    """Return a path as the recipe writes it: relative if it lies in the recipe's folder; a hub name unchanged."""
    if not exists:
        return place
    folder = path.absolute().parent
    absolute = Path(os.path.abspath(Path(place).expanduser()))
    return str(absolute.relative_to(folder)) if absolute.is_relative_to(folder) else str(absolute)


def _is_here(data: str) -> bool:
    """Return True if a source is files of this machine; a variable in its path may name them elsewhere."""
    from luthier.data.read.sources import find_files, is_address

    return "$" not in data and not is_address(data) and bool(find_files(data))


def _model_near(model: str, path: Path) -> str:
    """Return a model as the recipe writes it; `./` before a folder distinguishes it from a hub name."""
    is_folder = model != "demo" and Path(model).expanduser().is_dir()
    near = _near(model, path, exists=is_folder)
    return near if not is_folder or os.path.isabs(near) else f"./{near}"


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_flow(inner)}" for name, inner in value.items()) + "}"
    return _scalar(value)


def _scalar(value: Any) -> str:
    """Return a value in the form that YAML reads back unchanged."""
    from luthier.recipe.reading.yaml12 import load_yaml

    if isinstance(value, str) and PLAIN.fullmatch(value) and load_yaml(value, "")[0] == value:
        return value
    return json.dumps(value, ensure_ascii=False)
