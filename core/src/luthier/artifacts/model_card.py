"""The model card of an artifact, README.md: what it was made of, with what, and how good it was, from its note."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from luthier.errors import LuthierError
from luthier.plugins.registry import installed_plugins
from luthier.recipe.artifact_note import EXPORTED
from luthier.runs.writing.record import library_versions

CARD: Final = "README.md"
MARK: Final = re.compile(r"<!-- luthier card ([0-9a-f]{12}): [^\n]*-->\n")
SAID: Final = "written again with the artifact, unless something here is changed"


SETTINGS: Final = (
    "learning_rate",
    "lr_scheduler_type",
    "global_batch_size",
    "num_train_epochs",
    "max_steps",
    "max_tokens",
    "seed",
)
HUB: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")


def card_facts(settings: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that a note keeps for cards, from a resolved recipe as plain data and from the prepared rows."""
    base = str(settings["model"]["name_or_path"])
    sources = [str(source["path"]) for source in settings["data"]["train"]]
    return {
        "hub_model": base if is_of_hub(base) else None,
        "data": [{"path": shown_place(path), "hub": is_of_hub(path)} for path in sources],
        **rows,
        "loss": settings["loss"],
        "optimizer": settings["optimizer"],
        "settings": {name: settings[name] for name in SETTINGS if settings[name] is not None},
        "versions": library_versions(),
    }


def is_of_hub(name: str) -> bool:
    """Return True for a name that is no local path, so that it belongs to the hub."""
    return HUB.fullmatch(name) is not None and name != "demo" and not Path(name).exists()


def put_card(aside: Path, folder: Path, note: Mapping[str, Any]) -> None:
    """Write the card of an artifact that will replace the one in `folder`.

    A card that a user wrote is copied instead.
    """
    before = folder / CARD
    if before.is_file() and not is_generated(before.read_text("utf-8", errors="replace")):
        shutil.copyfile(before, aside / CARD)
    else:
        (aside / CARD).write_text(make_card(note, library=library_of(aside)), "utf-8")


def library_of(folder: Path) -> str:
    """Return the hub's name of the library that reads a folder's files."""
    if (folder / "adapter_config.json").is_file():
        return "peft"
    return next((library for kind, library in EXPORTED.items() if any(folder.glob(kind))), "transformers")


def is_generated(text: str) -> bool:
    """Return True if a card is unchanged since luthier wrote it."""
    match = MARK.search(text)
    return match is not None and match[1] == _digest(MARK.sub("", text))


def make_card(note: Mapping[str, Any], *, library: str) -> str:
    """Return the card that describes a note, with the metadata of the Hugging Face hub at its beginning.

    `library` is the hub's name of the one that reads the files, as `library_of` finds it.
    """
    facts = note.get("card") or {}
    adapter = "" if "unmerge" in note else str(note.get("adapter", {}).get("name", "a local object"))
    head = _metadata(note, facts, adapter, library)
    base = shown_place(str(note["model"]["name_or_path"])) if "model" in note else "a model"
    title = f"# {base}, {_describe_making(note, adapter)}\n"
    body = "\n".join(
        [title, *_made_of(note, facts, base), *_parts(note, facts), *_numbers(facts), *_again(facts, library)]
    )
    text = f"{head}\n{body}"
    return text.replace(title, f"<!-- luthier card {_digest(text)}: {SAID} -->\n{title}", 1)


def shown_place(path: str) -> str:
    """Return a path as a card shows it, without folders that exist on one machine only."""
    return Path(path).name if Path(path).is_absolute() or path.startswith("~") else path


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _metadata(note: Mapping[str, Any], facts: Mapping[str, Any], adapter: str, library: str) -> str:
    """Return YAML with JSON values. It has no license, because nothing here knows one."""
    loss = facts.get("loss", {}).get("name")
    base = None if "unmerge" in note else facts.get("hub_model")  # an unmerged base is made of no other model
    fields: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": None if not base else "adapter" if library == "peft" else "finetune",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["luthier", *(name for name in (adapter, loss) if name and " " not in name)],
        "datasets": [source["path"] for source in facts.get("data", ()) if source["hub"]],
    }
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items() if value]
    return "\n".join(["---", *lines, "---", ""])


def _describe_making(note: Mapping[str, Any], adapter: str) -> str:
    """Return the words of the title that say how the artifact came from its base."""
    if "unmerge" in note:
        return "with an adapter taken out of it again"
    if "combined" in note:
        return f"with {len(note['combined']['of'])} adapters combined by {note['combined']['method']}"
    return f"trained with {adapter}"


def _made_of(note: Mapping[str, Any], facts: Mapping[str, Any], base: str) -> Iterable[str]:
    digest = f" (`{note['base']}` over its files)" if note.get("base") else ""
    run = f" in run `{note['run_id']}`" if note.get("run_id") else ""
    yield f"Made by Luthier {note.get('luthier', '')}{run}.\n"
    yield f"- base model: `{base}`{digest}"
    yield from _others(note)
    for source in facts.get("data", ()):
        yield f"- data: `{shown_place(source['path'])}`"
    if facts.get("fingerprint"):
        yield f"- rows: {facts['examples']:,} examples, {facts['tokens']:,} tokens, hash `{facts['fingerprint']}`"
    progress = note.get("progress") or {}
    if progress and run:  # combined adapters were not trained themselves
        yield f"- trained: {progress['step']} steps, {progress['epoch']:.4g} epochs"
    yield ""


def _others(note: Mapping[str, Any]) -> Iterable[str]:
    """Yield the artifacts that this one was made of, if no run has made it."""
    if "unmerge" in note:
        taken = note["unmerge"]
        exact = "bit for bit those of the base model" if taken["bit_exact"] else "to the rounding of the merged files"
        yield f"- taken out: {_adapter_line(taken['adapter'], taken.get('run'))}"
        yield f"- weights: {exact}"
    combined = note.get("combined", {})
    for number, path in enumerate(combined.get("of", ())):
        run = combined["runs"][number] if "runs" in combined else None
        weight = "" if combined["method"] == "slao" else f", weight {combined['weights'][number]:.4g}"
        yield f"- adapter: {_adapter_line(path, run)}{weight}"


def _adapter_line(path: str, run: str | None) -> str:
    return f"`{shown_place(path)}`" + (f" of run `{run}`" if run else "")


def _parts(note: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterable[str]:
    """Yield a table row for each part that made it, with the options that are not defaults."""
    if "unmerge" in note:
        return
    versions = {part["kind"]: part for part in note.get("parts", ())}
    yield "## Parts\n\n| kind | name | options | from |\n|---|---|---|---|"
    for kind in ("adapter", "quantizer", "loss", "optimizer"):
        spec = facts.get(kind) or note.get(kind)
        if spec:
            part = versions.get(kind, {})
            source = f"{part['distribution']} {part['version']}" if part.get("distribution") else "a local object"
            yield f"| {kind} | `{spec.get('name', 'local')}` | {_changed(kind, spec)} | {source} |"
    yield ""


def _changed(kind: str, spec: Mapping[str, Any]) -> str:
    """Return the options that are not defaults."""
    given = {name: value for name, value in spec.items() if name != "name"}
    try:
        plugins = installed_plugins()
        usual = plugins.options(plugins.get(kind, spec["name"]))()
        given = {name: value for name, value in given.items() if _plain(getattr(usual, name, None)) != _plain(value)}
    except (LuthierError, KeyError, TypeError):  # a part from Python, or options that are required
        pass
    return ", ".join(f"`{name}: {json.dumps(_plain(value))}`" for name, value in given.items()).replace("|", "\\|")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else str(value) if isinstance(value, Path) else value


def _numbers(facts: Mapping[str, Any]) -> Iterable[str]:
    results = facts.get("results") or {}
    if results:
        yield "## Numbers at the end\n\n| metric | value |\n|---|---|"
        yield from (f"| {name} | {value:.6g} |" for name, value in results.items() if value is not None)
        yield ""


def _again(facts: Mapping[str, Any], library: str) -> Iterable[str]:
    settings = facts.get("settings") or {}
    if settings:
        talk = ("the run", "RUN") if library in EXPORTED.values() else ("it", "FOLDER")
        words = " ".join(f"--{name.replace('_', '-')} {json.dumps(value)}" for name, value in settings.items())
        yield f"## Again\n\n    luthier train recipe.yaml {words}\n"
        yield f"where `recipe.yaml` is that of the run's folder. Talk with {talk[0]}: `luthier chat {talk[1]}`.\n"
    versions = facts.get("versions") or {}
    if versions:
        yield "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".\n"
