"""The answers to what other tools write: the reason why an option is not needed here, or what to write instead."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from luthier.error_lists import flatten_errors
from luthier.errors import LuthierError
from luthier.plugins.fields.hints import field_hints
from luthier.plugins.registry import installed_plugins
from luthier.plugins.structure import bare_value
from luthier.recipe.parts import FIELDS
from luthier.recipe.reading.aliases import ALIASES, READINGS
from luthier.recipe.reading.draft import Draft, label_error
from luthier.recipe.reading.foreign_table import CASES, INSTEAD, LEAVE, MISREAD, REASONS, UNREAD, VALUE, VALUES
from luthier.recipe.schema import Settings

WORD: Final = re.compile(r"\w+")
FOREIGN: Final = {key: reason for reason, keys in REASONS.items() for key in keys.split()}
PLAIN: Final = re.compile(r"[A-Za-z_][\w./-]*")  # text that YAML reads as text without quotes
ABSENT: Final = object()


def find_foreign_values(draft: Draft, told: Sequence[LuthierError]) -> list[LuthierError]:
    """Return an error for each value of a recipe that only another tool understands, but not at places `told`."""
    places = {error.where for error in flatten_errors(told)}
    written = {".".join(entry.origin): entry for entry in draft.origins.values()}
    errors = []
    for rule in VALUES:
        entry = written.get(rule.key)
        value = None if entry is None else bare_value(entry.value)
        if entry is not None and rule.fits(value) and (not rule.beside or rule.beside & written.keys()):
            where = label_error(rule.key, entry.layer.label(entry.origin), rule.key)
            errors.append(LuthierError("recipe-unknown-option", rule.problem, where=where, found=_paths_of(value),
                                       remedy=rule.remedy))  # fmt: skip
    return [error for error in errors if error.where not in places]


def explain_foreign(
    errors: Sequence[LuthierError], tree: Mapping[str, Any], *, lost: bool = False
) -> list[LuthierError]:
    """Return the errors, with an answer added to each option and value that only another tool has.

    `tree` holds what was written. `lost` says that some entries could not be read, so that an option reported as
    missing may have been given.
    """
    flat = flatten_errors(errors)
    certain = [error for error in flat if not (lost and error.code == "recipe-missing")]
    return [_explained(error, tree) for error in certain or flat]


def find_remedy(path: str, value: Any = ABSENT) -> tuple[str, str] | None:
    """Return the problem and the remedy for another tool's option at a dotted path; None if it is not known.

    `value` is what was written there, if that is known.
    """
    key = path.rpartition(".")[2] if path.startswith("data.") else path
    known = key in INSTEAD or key in CASES or key in FOREIGN
    if known and value is None:
        return "is an empty option of another tool, which changes nothing", LEAVE
    remedy = _choose_case(CASES.get(key, {}), value) or INSTEAD.get(key)
    if remedy is not None:
        problem = "is not needed here" if remedy.startswith(LEAVE[:-1]) else "is written otherwise here"
        return problem, remedy.replace(VALUE, "VALUE" if value is ABSENT else _shown(value))
    return (f"is not needed here, because {FOREIGN[key]}", LEAVE) if key in FOREIGN else None


def _paths_of(value: Any) -> Any:
    """Return the paths of sources as text; another value unchanged."""
    return ", ".join(source["path"] for source in value) if isinstance(value, list) else value


def _choose_case(cases: Mapping[Any, str], value: Any) -> str | None:
    """Return the answer to a value, or to values of its type."""
    return next((answer for case, answer in cases.items() if case is type(value) or _equals(case, value)), None)


def _equals(case: Any, value: Any) -> bool:
    return type(case) is type(value) and case == value


def _shown(value: Any) -> str:
    """Return a value as YAML writes it on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _meant_option(path: str, known: str) -> str | None:
    """Return the option among the `known` ones that other tools call as the last word of `path`, as in `lora_rank`."""
    kind, _, option = path.rpartition(".")
    names = WORD.findall(known) if known.startswith("Known:") else []
    meant = [ALIASES[alias].rpartition(".") for alias in ALIASES if alias.endswith(f"_{option}")]
    return next((own for section, _, own in meant if section == kind and own in names), None)


def _setting_beside(path: str, value: Any, known: str) -> str | None:
    """Return the remedy for a setting of the run that was written as an option of a part; None if it is none.

    A part's own option of nearly that name, which `known` then suggests, is likelier meant than another tool's name.
    """
    kind, _, option = path.rpartition(".")
    meant = {option: value} if option in field_hints(Settings) else {}
    if kind not in FIELDS or (known.startswith("Did") and not meant):
        return None
    if option in READINGS:
        with contextlib.suppress(LuthierError):  # a value that the setting does not take either
            meant = READINGS[option](value)
    elif option in ALIASES and not ALIASES[option].startswith(f"{kind}."):
        meant = {ALIASES[option]: value}
    written = " and ".join(f"{name}: {_shown(given)}" for name, given in meant.items())
    return f"It stands beside {kind}, not in it: write {written}." if written else None


def list_part_options(steps: Sequence[str]) -> list[str]:
    """Return the paths of an option of installed parts that was written without its kind: `loss.beta` for `beta`."""
    kinds = FIELDS if len(steps) == 1 else ()
    offers = [(kind, offer) for kind in kinds for offer in installed_plugins().offers(kind)]
    classes = [(kind, offer.record.options) for kind, offer in offers if not isinstance(offer.record.options, str)]
    found = [kind for kind, cls in classes if attrs.has(cls) and steps[0] in attrs.fields_dict(cls)]
    return [f"{kind}.{steps[0]}" for kind in dict.fromkeys(found)]


def _explained(error: LuthierError, tree: Mapping[str, Any]) -> LuthierError:
    path = (error.where or "").rpartition(": ")[2].lstrip("-")
    value = _value_at(tree, path)
    if error.code == "recipe-wrong-type" and path in MISREAD and MISREAD[path][0](value):
        remedy = MISREAD[path][1].replace(VALUE, _shown(value))
        return LuthierError(error.code, error.problem, where=error.where, found=error.found, remedy=remedy)
    if error.code != "recipe-unknown-option":
        return error
    answer = find_remedy(path, value)
    if path in UNREAD and not _is_given(tree, UNREAD[path][0]):
        answer = UNREAD[path][1:]
    if answer is None:
        meant = _meant_option(path, error.remedy or "")
        near = [meant] if meant is not None else list_part_options(path.split("."))
        written = None if near else _setting_beside(path, value, error.remedy or "")
        advice = f"Did you mean {' or '.join(map(repr, near))}?" if near else written
        if advice is None:
            return error
        answer = error.problem, advice
    return LuthierError(error.code, answer[0], where=error.where, found=error.found, remedy=answer[1])


def _is_given(tree: Mapping[str, Any], path: str) -> bool:
    value = _value_at(tree, path)
    return value is not ABSENT and bool(value)


def _value_at(tree: Any, path: str) -> Any:
    """Return the value at a dotted path, or `ABSENT`."""
    for step in path.split("."):
        if isinstance(tree, Mapping) and step in tree:
            tree = tree[step]
        elif isinstance(tree, list) and step.isdecimal() and int(step) < len(tree):
            tree = tree[int(step)]
        else:
            return ABSENT
    return bare_value(tree)
