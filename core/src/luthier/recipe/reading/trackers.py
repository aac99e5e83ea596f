"""`report_to`, the option of transformers that names trackers: here each is a callback of that name."""

from __future__ import annotations

from typing import Any, Final

from luthier.errors import LuthierError
from luthier.plugins.registry import Plugins
from luthier.plugins.structure import Written, bare_value, wrong_value
from luthier.recipe.parts import find_part
from luthier.recipe.reading.callback_list import ADDED, EXACT
from luthier.recipe.reading.draft import Draft

REPORT: Final = "report_to"


def add_trackers(draft: Draft, plugins: Plugins) -> None:
    """Add the trackers of `report_to` to the callbacks of a draft; one that is listed there already stays as it is.

    The word `none` and an empty list add nothing. Raises `LuthierError` for a name that is no installed callback.
    """
    if REPORT not in draft.tree:
        return
    names = _tracker_names(draft.tree.pop(REPORT))
    for name in names:
        find_part(name, "callback", REPORT, plugins)
    key = EXACT if EXACT in draft.tree else ADDED
    listed = draft.tree.get(key)
    if listed is not None and not isinstance(listed, list):
        return  # which is told where callbacks are read
    missing = [name for name in names if name not in map(_callback_name, listed or ())]
    if not missing:
        return
    if listed is not None and [_callback_name(entry) for entry in listed] in ([], ["none"]):
        key, listed = EXACT, []  # no callback but these
        draft.tree.pop(ADDED, None)
    draft.tree[key] = [*(listed or ()), *missing]
    draft.origins.setdefault((key,), draft.origins[(REPORT,)])
    label = draft.label((REPORT,))
    meaning = f"{REPORT} adds the {'callbacks' if len(missing) > 1 else 'callback'} {', '.join(missing)}"
    draft.notes.append(f"{label}: {meaning}" if label else meaning)


def _tracker_names(value: Any) -> list[str]:
    """Return the names in a value of `report_to`: one, a list of them, or several with commas between."""
    plain = bare_value(value)
    if plain is None:
        return []
    names = plain.split(",") if isinstance(plain, str) else plain
    if not isinstance(names, list) or not all(isinstance(name, str) for name in map(bare_value, names)):
        raise wrong_value(value, "the name of a tracker, or a list of names").at(REPORT)
    stripped = list(dict.fromkeys(bare_value(name).strip() for name in names))
    if stripped == ["none"]:
        return []
    if "all" in stripped:
        raise LuthierError("recipe-conflict", "nothing is reported unasked", where=REPORT, found=plain,
                           remedy="Name the trackers, such as report_to: [wandb, tensorboard].")  # fmt: skip
    return stripped


def _callback_name(entry: Any) -> Any:
    if isinstance(entry, Written):
        return entry.text
    return bare_value(entry.get("name")) if isinstance(entry, dict) else entry
