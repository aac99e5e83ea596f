"""Differences between a run and the checkpoint or folder that it goes on from, and which of them are allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from luthier.errors import LuthierError, show_value, suggest_nearest
from luthier.logs import get_logger

if TYPE_CHECKING:
    from luthier.recipe import Recipe

log = get_logger()
PARTS: Final = ("adapter", "loss", "optimizer", "quantizer", "provider")
SECTIONS: Final = {"data": ("data",), "parts": PARTS, "model": ("model",)}
# the words of --allow-changed; "settings" allows every other option of the recipe
ALLOWABLE: Final = (*SECTIONS, "settings")
MENTIONED: Final = 3
ROWS: Final = "the rows of data.train"


@attrs.frozen(kw_only=True)
class Change:
    """One thing that differs from before. `section` is the word of --allow-changed that allows it."""

    section: str
    name: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {show_value(self.was, 40)}, is {show_value(self.now, 40)}"


def read_allowed(given: str | Iterable[str]) -> frozenset[str]:
    """Return the sections that `--allow-changed data,parts` names. Raises `recipe-out-of-range` for an unknown one."""
    words = given.split(",") if isinstance(given, str) else [w for item in given for w in item.split(",")]
    allowed = frozenset(word.strip() for word in words if word.strip())
    for word in sorted(allowed - set(ALLOWABLE)):
        raise LuthierError("recipe-out-of-range", "no section has this name", where="allow_changed",
                           found=word, remedy=suggest_nearest(word, ALLOWABLE))  # fmt: skip
    return allowed


def list_belongings(recipe: Recipe, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies the run that a checkpoint belongs to, kept in the checkpoint.

    `record` is that of run.json.
    """
    from luthier.recipe.writing import determining_settings

    belongings = {"recipe": record["recipe_hash"], "settings": determining_settings(recipe), "run_id": record["run_id"]}
    return {**belongings, **{name: record[name] for name in ("data", "base", "parts") if name in record}}


def find_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the differences between two results of `list_belongings`, or parts of them."""
    changes = _settings(was["settings"], now["settings"]) if "settings" in was and "settings" in now else []
    if not changes and "settings" not in was and was.get("recipe", now.get("recipe")) != now.get("recipe"):
        changes.append(Change(section="settings", name="recipe", was=was["recipe"], now=now["recipe"]))
    for name, section, label in (("data", "data", ROWS), ("base", "model", "the base model")):
        if name in was and name in now and was[name] != now[name]:
            changes.append(Change(section=section, name=label, was=was[name], now=now[name]))
    return [*changes, *_distributions(was.get("parts", ()), now.get("parts", ()))]


def refuse_changes(
    changes: Sequence[Change], allowed: frozenset[str], where: str, code: str = "checkpoint-other"
) -> None:
    """Raise for the differences that are not allowed, and log those that are.

    The code is `data-changed` if only the rows differ, else `code`. The remedy names the words of --allow-changed.
    """
    refused = [change for change in changes if change.section not in allowed]
    if refused:
        reasons = "; ".join(map(str, refused[:MENTIONED])) + ("; ..." if len(refused) > MENTIONED else "")
        words = ",".join(sorted({change.section for change in refused}))
        first = "Choose another output_dir" if code == "run-folder-other" else "Restore it"
        remedy = f"{first}, start with --fresh, or go on all the same with --allow-changed {words}."
        if [change.name for change in refused] == [ROWS]:
            problem = "the rows differ from those that the run began with"
            raise LuthierError("data-changed", problem, where=f"{where}: data.train", remedy=remedy)
        raise LuthierError(code, reasons, where=where, remedy=remedy)
    for change in changes:
        log.warning("changed, as allowed", what=str(change), allowed=change.section)


def begun_anew(was: Mapping[str, Any], now: Mapping[str, Any]) -> frozenset[str]:
    """Return which states of a checkpoint this run does not take: those of other parts, and the feed's if the rows
    differ.

    `optimizer_settings` stands for the same optimizer with other options: it keeps its moments and takes the options.
    """
    one, other = _today(was["settings"]) if "settings" in was else {}, now.get("settings", {})
    names = (
        {k for k in ("loss", "optimizer", "quantizer") if _name(one.get(k)) != _name(other.get(k))} if one else set()
    )
    if was.get("data", now.get("data")) != now.get("data"):
        names.add("feed")
    if names:
        log.warning("begins anew", what=sorted(names), because="the checkpoint has another")
    if one and one.get("optimizer") != other.get("optimizer") and "optimizer" not in names:
        log.warning("the optimizer takes its new options and keeps its moments")
        names.add("optimizer_settings")
    return frozenset(names)


def continue_record(
    record: dict[str, Any], now: Mapping[str, Any], allowed: frozenset[str], folder: Path, recipe_changed: bool
) -> dict[str, Any]:
    """Return the record of a run that goes on with what is there `now`, with a list of the allowed changes."""
    changes = find_changes(record, {**now, "recipe": now["recipe_hash"]})
    refuse_changes(changes, allowed, str(folder))
    tell_versions(record, now)
    if not changes and not recipe_changed:
        return record
    renewed = {name: now[name] for name in ("recipe_hash", "data", "base", "parts", "note")}
    return note_changes({**record, **renewed}, [*map(str, changes), *(["the recipe"] if recipe_changed else [])])


def note_changes(record: dict[str, Any], what: Sequence[object]) -> dict[str, Any]:
    """Return the record with the allowed changes added, and the step after which they came."""
    entry = {"step": record.get("step"), "what": [str(change) for change in what]}
    return {**record, "changes": [*record.get("changes", []), entry]} if what else record


def tell_versions(was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn of changed versions of parts and libraries, because their results may be rounded differently."""
    pairs = {name: (version, now["versions"].get(name)) for name, version in was.get("versions", {}).items()}
    pairs |= {key: (version, _versions(now).get(key)) for key, version in _versions(was).items()}
    moved = {name: f"{one} -> {other}" for name, (one, other) in pairs.items() if other is not None and one != other}
    if moved:
        log.warning("other versions than the run began with", **{n.replace("-", "_"): v for n, v in moved.items()})


def _versions(record: Mapping[str, Any]) -> dict[str, str]:
    return {p["distribution"]: p["version"] for p in record.get("parts", ()) if p.get("distribution")}


def _settings(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    was = _today(was)
    others = [k for k in PARTS if _name(was.get(k)) != _name(now.get(k))]  # the options of another part are no changes
    changes = [Change(section="parts", name=k, was=_name(was.get(k)), now=_name(now.get(k))) for k in others]
    one, other = (_flat({k: v for k, v in tree.items() if k not in others}) for tree in (was, now))
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return changes + [Change(section=_section(n), name=n, was=one.get(n), now=other.get(n)) for n in names]


def _today(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return settings that an earlier luthier wrote, with the defaults of options that were added since."""
    from luthier.recipe import Recipe
    from luthier.recipe.writing import determining_settings, without_watching

    known = without_watching(settings)
    try:
        return determining_settings(Recipe.from_dict(known))
    except LuthierError:  # an object from Python, or a part that is not installed
        return known


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def _section(path: str) -> str:
    top = path.partition(".")[0]
    return next((section for section, names in SECTIONS.items() if top in names), "settings")


def _distributions(was: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]]) -> list[Change]:
    """Return the changes of distribution: parts of the same kind and name that another distribution now offers."""
    known = {(part["kind"], part["name"]): part["distribution"] for part in was if part["kind"] in PARTS}
    moved = [(p, known[p["kind"], p["name"]]) for p in now if (p["kind"], p["name"]) in known]
    return [
        Change(section="parts", name=f"{p['kind']} {p['name']}", was=before, now=p["distribution"])
        for p, before in moved
        if before != p["distribution"]
    ]


def _name(part: Any) -> Any:
    return (part.get("name") or part.get("local")) if isinstance(part, Mapping) else part
