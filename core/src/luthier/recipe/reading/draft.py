"""The draft of a recipe: layers of values merged into one tree, in which each value remembers where it was written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from luthier.errors import LuthierError, show_value
from luthier.plugins.structure import Written, bare_value
from luthier.recipe.parts import FIELDS
from luthier.recipe.reading.computing_aliases import QUANTIZED
from luthier.recipe.schema import Settings

Steps = tuple[str, ...]  # a dotted path: ("data", "train", "0", "path")


@attrs.frozen(kw_only=True, eq=False)
class Layer:
    """A source of values: a file, the environment, the command line, or Python.

    `labels` name where a value was written, such as `recipe.yaml:7` or `--adapter.r`, by the path as it was written.
    `base` is the folder that its relative paths are relative to; None leaves them unchanged.
    """

    labels: Mapping[Steps, str] = attrs.field(factory=dict)
    base: Path | None = None

    def label(self, steps: Steps) -> str:
        """Return the label of the nearest path at or above `steps`, or an empty text."""
        near = (self.labels[steps[:n]] for n in range(len(steps), -1, -1) if steps[:n] in self.labels)
        return next(near, "")


@attrs.frozen(kw_only=True, eq=False)
class Entry:
    """A value for the path `steps`, written as `origin` in its layer. `implies` names the part that it belongs to."""

    steps: Steps
    value: Any
    origin: Steps
    layer: Layer
    implies: str | None = None

    @property
    def label(self) -> str:
        return self.layer.label(self.origin) or ".".join(self.origin)


@attrs.define
class Draft:
    """The tree as merged so far, the entry behind each path, and notes for the user."""

    tree: dict[str, Any] = attrs.field(factory=dict)
    origins: dict[Steps, Entry] = attrs.field(factory=dict)
    notes: list[str] = attrs.field(factory=list)
    home: Layer | None = None  # the first layer, to which missing options should be added
    errors: list[LuthierError] = attrs.field(factory=list)  # each with its place; raised together at the end
    top: Layer | None = None  # the last layer, which wins

    def add(self, entries: Iterable[Entry]) -> None:
        """Merge the canonical entries of one layer over the tree, those with shorter paths first."""
        for entry in sorted(entries, key=lambda e: len(e.steps)):
            try:
                self._put(self._settle_callbacks(entry))
            except LuthierError as error:
                self.errors.append(self.placed(error))

    def origin(self, steps: Steps) -> tuple[Layer, Steps] | None:
        """Return the layer that wrote the value at `steps`, and its path there; None for a default."""
        for n in range(len(steps), 0, -1):
            entry = self.origins.get(steps[:n])
            if entry:
                return entry.layer, entry.origin + steps[n:]
        return None

    def is_topmost(self, steps: Steps) -> bool:
        """Return True if the last layer wrote the value at `steps`."""
        written = self.origin(steps)
        return written is not None and written[0] is self.top

    def base(self, steps: Steps) -> Path | None:
        origin = self.origin(steps)
        return origin[0].base if origin else None

    def label(self, steps: Steps) -> str:
        """Return where the value at `steps` was written; for an unwritten one, where the first layer would write it."""
        origin = self.origin(steps)
        if origin:
            return origin[0].label(origin[1])
        return self.home.label(steps) if self.home else ""

    def placed(self, error: LuthierError) -> LuthierError:
        """Return the error, and those joined to it, preceded by the file and line, flag or variable of the option."""
        return error.relocated(self._place_of)

    def _place_of(self, where: str | None) -> str | None:
        path = (where or "").split(":")[0]
        steps = tuple(path.split("."))
        if steps[0] not in attrs.fields_dict(Settings) and steps[:1] not in self.origins:
            return where  # it names a flag or a file already
        return label_error(where, self.label(steps), path)

    def _settle_callbacks(self, entry: Entry) -> Entry:
        """Keep one of `callbacks` and `exact_callbacks`, the later layer's.

        An option set by number belongs to the list there.
        """
        other = {"callbacks": "exact_callbacks", "exact_callbacks": "callbacks"}.get(entry.steps[0])
        if other is None or other not in self.tree:
            return entry
        if len(entry.steps) > 1:
            return attrs.evolve(entry, steps=(other, *entry.steps[1:]))
        if self.origins[(other,)].layer is entry.layer:
            problem = f"{entry.steps[0]} and {other} are both given, but each is a choice of the run's callbacks"
            raise LuthierError("recipe-conflict", problem, where=entry.label)
        del self.tree[other]
        for steps in [steps for steps in self.origins if steps[0] == other]:
            del self.origins[steps]
        return entry

    def _put(self, entry: Entry) -> None:
        *above, last = entry.steps
        node = self._descend(entry, above)
        key: Any = _index(node, last, entry) if isinstance(node, list) else last
        known = node[key] if isinstance(node, list) else node.get(key)
        origin = self.origin(entry.steps)
        if known is not None and origin and origin[0] is entry.layer:
            _refuse_second(entry, known, origin[0].label(origin[1]))
        if self._is_renaming(entry, known):
            known["name"] = entry.value
            self.origins[(*entry.steps, "name")] = entry
            return
        self._note_loss(entry, known)
        self._forget_model(entry, known)
        if entry.steps == ("data", "validation") and known is not None:
            self.notes.append(f"{entry.label}: replaces the data.validation given earlier")
        node[key] = entry.value
        if known is not None:
            for steps in [s for s in self.origins if s[: len(entry.steps)] == entry.steps]:
                del self.origins[steps]
        self.origins[entry.steps] = entry

    def _descend(self, entry: Entry, above: list[str]) -> Any:
        """Return the mapping or list that holds the entry's last step. A part given as a name becomes a mapping."""
        node: Any = self.tree
        for depth, step in enumerate(above):
            here = tuple(above[: depth + 1])
            key: Any = _index(node, step, entry) if isinstance(node, list) else step
            known = node[key] if isinstance(node, list) else node.get(key)
            node[key] = _opened(known, here, entry)
            node = node[key]
        return node

    def _is_renaming(self, entry: Entry, known: Any) -> bool:
        """Return True if the entry names the part that is there already, so that its options stay."""
        part = entry.steps[0] in FIELDS and len(entry.steps) == 1
        return part and isinstance(known, dict) and _family(known.get("name")) == _family(entry.value)

    def _note_loss(self, entry: Entry, known: Any) -> None:
        """Add a note if a new part replaces one with options, because those are lost."""
        if entry.steps[0] not in FIELDS or len(entry.steps) > 1 or not isinstance(known, dict):
            return
        options = [f"{entry.steps[0]}.{name}" for name in known if name != "name"]
        if options and isinstance(entry.value, str):
            note = f"{entry.value} replaces {known.get('name')}, and with it {', '.join(options)}"
            self.notes.append(f"{entry.label}: {note}")

    def _forget_model(self, entry: Entry, known: Any) -> None:
        """Drop the revision and tokenizer of the file's model if another layer names another model."""
        if entry.steps != ("model", "name_or_path") or known is None or bare_value(known) == bare_value(entry.value):
            return
        for name in ("revision", "tokenizer"):
            origin = self.origin(("model", name))
            if name in self.tree["model"] and origin and origin[0] is not entry.layer:
                del self.tree["model"][name]
                self.notes.append(f"{entry.label}: another model, so model.{name} is dropped")


def label_error(where: str | None, label: str, path: str) -> str | None:
    """Return a place with a label in front. A flag that spells the option's path replaces the place."""
    if not label:
        return where
    if label.lstrip("-").replace("-", "_") == path:
        return label
    return f"{label}: {where}" if where else label


def _opened(known: Any, here: Steps, entry: Entry) -> Any:
    """Return a value as a mapping or list that can hold options. Raises `recipe-wrong-type` if it cannot."""
    known = known.value if isinstance(known, Written) else known
    if isinstance(known, (dict, list)):
        return known
    part = here[0] in FIELDS and len(here) == 1
    if known is None and part:
        return {"name": entry.implies or default_of(here[0])}
    if isinstance(known, str) and (part or (here[0] in ("callbacks", "exact_callbacks") and len(here) == 2)):
        return {"name": known}
    if known is None:
        return default_of("callbacks") if here == ("callbacks",) else {}
    remedy = "Pass another object in Python." if part else None
    problem = f"{'.'.join(here)} has no options to set"
    raise LuthierError("recipe-wrong-type", problem, where=entry.label, found=known, remedy=remedy)


def _index(node: list[Any], step: str, entry: Entry) -> int:
    if not step.isdecimal() or int(step) >= len(node):
        problem = f"the list has {len(node)} items, counted from 0"
        raise LuthierError("recipe-out-of-range", problem, where=entry.label, found=step)
    return int(step)


def _refuse_second(entry: Entry, known: Any, label: str) -> None:
    if bare_value(known) == bare_value(entry.value) or (isinstance(known, dict) and known.get("name") == entry.value):
        return
    path, first = ".".join(entry.steps), label or ".".join(entry.steps)
    one, other = show_value(bare_value(known)), show_value(bare_value(entry.value))
    problem = f"{path} is given twice, as {one} by {first} and {other} by {entry.label}"
    raise LuthierError("recipe-conflict", problem, where=path)


def default_of(name: str) -> Any:
    """Return the default of a recipe's field."""
    default: Any = getattr(attrs.fields(Settings), name).default
    return default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]


def _family(name: Any) -> Any:
    return QUANTIZED.get(name, name) if isinstance(name, str) else name
