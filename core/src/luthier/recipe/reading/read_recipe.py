"""The reading of a recipe: layers merged, aliases resolved, parts looked up, and everything structured strictly."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import attrs

from luthier.error_lists import join_errors
from luthier.errors import LuthierError
from luthier.plugins.records import NoOptions
from luthier.plugins.registry import Plugins, installed_plugins
from luthier.plugins.structure import bare_value, place_error, structure_value
from luthier.recipe.artifact_note import RECORD
from luthier.recipe.checks.contradictions import batch_product
from luthier.recipe.checks.other_models import open_run_model
from luthier.recipe.parts import FIELDS, LISTS, Part, check_repeated, find_part, is_absent, plain_value
from luthier.recipe.reading.aliases import joined_betas, quantized_names, rename_alias
from luthier.recipe.reading.callback_list import ADDED, EXACT, read_callbacks
from luthier.recipe.reading.draft import Draft, Entry, Layer, default_of, label_error
from luthier.recipe.reading.foreign_keys import explain_foreign, find_foreign_values
from luthier.recipe.reading.overrides import Override, from_environment, from_python, parse_sets
from luthier.recipe.reading.part_lists import brief_part, given_parts, read_parts
from luthier.recipe.reading.paths import escape_variables, expand_variables, locate_paths
from luthier.recipe.reading.recipe_files import find_file, read_recipe_file
from luthier.recipe.reading.shorthand import expand_shorthand as expand_short
from luthier.recipe.reading.trackers import add_trackers
from luthier.recipe.schema import Settings

Made = TypeVar("Made", bound=Settings)
SEQUENCE: Final = ("tasks", "num_runs")  # settings that only a sequence of runs has


@attrs.frozen(kw_only=True)
class Reading(Generic[Made]):
    """A recipe, and notes for the user: our name of each alias, and what was dropped.

    `given` holds what was written, by dotted name, without defaults; `over` names what the last layer wrote of it.
    """

    recipe: Made
    notes: tuple[str, ...] = ()
    given: Mapping[str, Any] = attrs.field(factory=dict)
    over: frozenset[str] = frozenset()


def read_mapping(
    made: type[Made], mapping: Mapping[str, Any], *, base: str | Path | None = None, plugins: Plugins | None = None
) -> Reading[Made]:
    """Return settings of type `made` from plain data. The environment is read for `${NAME}` only."""
    if not isinstance(mapping, Mapping):
        raise LuthierError("recipe-wrong-type", "a recipe must be a mapping", found=mapping)
    draft, layer = Draft(), Layer(base=Path(base).absolute() if base is not None else None)
    _refuse_sequence(layer, mapping)
    _lay(draft, layer, mapping, os.environ)
    return _finish(made, draft, plugins)


def read_settings(
    made: type[Made],
    source: str | Path | Mapping[str, Any] | Settings | None = None,
    overrides: Mapping[str, Any] | Iterable[Override | str] = (),
    *,
    base: Path | None = None,
    environ: Mapping[str, str] | None = None,
    plugins: Plugins | None = None,
) -> Reading[Made]:
    """Return settings of type `made` from a source and the layers over it; see `luthier.recipe.load_recipe`."""
    variables = os.environ if environ is None else environ
    draft, groups = Draft(), [_overrides(overrides)]
    if source is None or isinstance(source, (str, Path)):
        groups.insert(0, from_environment(variables))
    if source is not None:
        layer, tree = _begun(source, base, plugins or installed_plugins())
        _refuse_sequence(layer, tree)
        _lay(draft, layer, tree, variables)
    for group in groups:
        layer = Layer(labels={o.steps: o.label for o in group}, base=Path.cwd())
        _lay(draft, layer, [(o.steps, o.value) for o in group], variables)
    return _finish(made, draft, plugins)


def _begun(source: object, base: Path | None, plugins: Plugins) -> tuple[Layer, Mapping[str, Any]]:
    """Return the first layer and its tree: those of a file, or of data in Python, with paths relative to `base`."""
    if isinstance(source, Settings):
        return Layer(), _given_settings(source, plugins)
    if isinstance(source, Mapping):
        return Layer(base=base), source
    if not isinstance(source, (str, Path)):
        problem, remedy = "a recipe is a file, a mapping or a Recipe", "Pass rows as data, a model as model."
        raise LuthierError("recipe-wrong-type", problem, found=source, remedy=remedy)
    file = find_file(Path(source))
    tree, labels = read_recipe_file(file)
    # an older luthier wrote the exact list under the name that now adds to the defaults
    if ADDED in tree and (file.parent / RECORD).is_file():
        tree[EXACT] = tree.pop(ADDED)
        labels |= {(EXACT, *steps[1:]): label for steps, label in labels.items() if steps[:1] == (ADDED,)}
    return Layer(labels=labels, base=file.absolute().parent), tree


def _refuse_sequence(layer: Layer, tree: Mapping[str, Any]) -> None:
    """Raise `recipe-unknown-option` for the recipe of a sequence, whose rows are in its tasks: it is not one run."""
    for name in SEQUENCE:
        if name in tree:
            where = label_error(name, layer.label((name,)), name)
            problem, remedy = "this is a sequence of runs, and not one run", "Run `luthier continual` with this recipe."
            raise LuthierError("recipe-unknown-option", problem, where=where, remedy=remedy)


def _given_settings(recipe: Settings, plugins: Plugins) -> dict[str, Any]:
    """Return what a recipe sets besides the defaults, as plain data; the caller's objects stay objects."""
    fields = {kind: getattr(recipe, kind) for kind in FIELDS}
    settings = {
        kind: brief_part(part, kind, kind, plugins) for kind, part in fields.items() if not is_absent(kind, part)
    }
    settings[EXACT] = [brief_part(c, "callback", f"{ADDED}.{i}", plugins) for i, c in enumerate(recipe.callbacks)]
    settings |= {n: given_parts(getattr(recipe, n), n, plugins) for n in LISTS if getattr(recipe, n) != default_of(n)}
    others = [f.name for f in attrs.fields(Settings) if f.name not in (*settings, *LISTS, ADDED)]
    given = {name: getattr(recipe, name) for name in others}
    return {
        k: escape_variables(plain_value(v)) for k, v in given.items() if k == "data" or v != default_of(k)
    } | settings


def _overrides(given: Mapping[str, Any] | Iterable[Override | str]) -> list[Override]:
    if isinstance(given, Mapping):
        return from_python(given)
    return [o for item in given for o in (parse_sets([item]) if isinstance(item, str) else [item])]


def _lay(draft: Draft, layer: Layer, items: Any, environ: Mapping[str, str]) -> None:
    """Merge one layer, given as a mapping or as pairs of steps and value."""
    draft.home, draft.top = draft.home or layer, layer
    pairs = [((), items)] if isinstance(items, Mapping) else items
    given = [Entry(steps=s, origin=s, layer=layer, value=_expanded(v, s, layer, environ)) for s, v in pairs]
    errors: list[LuthierError] = []
    draft.add([entry for one in given for entry in _canonical(one, draft.notes, errors)])
    draft.errors += [_placed(error, layer) for error in errors]


def _expanded(value: Any, steps: tuple[str, ...], layer: Layer, environ: Mapping[str, str]) -> Any:
    try:
        return expand_variables(value, environ)
    except LuthierError as error:
        raise _placed(place_error(error, ".".join(steps)), layer) from None


def _placed(error: LuthierError, layer: Layer) -> LuthierError:
    """Return the error of a path as a layer wrote it, with its line, flag or variable in front."""
    return error.relocated(lambda where: label_error(where, layer.label(tuple((where or "").split("."))), where or ""))


def _canonical(entry: Entry, notes: list[str], errors: list[LuthierError]) -> Iterator[Entry]:
    """Yield the entries that one entry stands for, under our own names and without short forms."""
    try:
        pairs = [(renamed, expand_short(renamed)) for renamed in rename_alias(entry, notes)]
    except LuthierError as error:
        errors.append(error)
        return
    for renamed, short in pairs:
        if short is None:
            yield renamed
        for child in short or ():
            yield from _canonical(child, notes, errors)


def _finish(made: type[Made], draft: Draft, plugins: Plugins | None) -> Reading[Made]:
    """Return the recipe that a draft means. Raises all of its errors at once, in the order of the settings."""
    known = plugins or installed_plugins()
    errors, causes = list(draft.errors), []

    def attempt(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except LuthierError as error:
            errors.append(draft.placed(error))
            causes.append(error.__cause__)

    attempt(lambda: open_run_model(draft))
    for settle in (quantized_names, joined_betas, add_trackers):
        attempt(functools.partial(settle, draft, known))
    attempt(lambda: _size_batch(draft.tree))
    settings = {name: value for name, value in draft.tree.items() if name not in (*FIELDS, *LISTS, ADDED, EXACT)}
    settings |= _listed_parts(draft.tree, attempt, known)
    recipe = attempt(lambda: structure_value(settings, made, ""))  # everything that no plugin is needed for comes first
    parts = {kind: attempt(functools.partial(_found_part, draft.tree, kind, known)) for kind in FIELDS}
    watchers = attempt(lambda: read_callbacks(draft.tree, known))
    errors += find_foreign_values(draft, errors)
    if errors:
        raise join_errors(explain_foreign(errors, draft.tree, lost=bool(draft.errors))) from next(iter(causes), None)
    recipe = attrs.evolve(recipe, callbacks=[_held(part) for _, part in watchers], **parts)
    places = [steps for steps, _ in watchers]
    located_recipe = locate_paths(recipe, lambda steps: draft.base(_written_at(steps, places)))
    given = dict(_written_leaves(draft.tree))
    over = frozenset(name for name in given if draft.is_topmost(tuple(name.split("."))))
    return Reading(recipe=located_recipe, notes=tuple(dict.fromkeys(draft.notes)), given=given, over=over)


def _written_at(steps: tuple[str, ...], places: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the path at which an option was written, which for callbacks may differ from the path they are read at."""
    return (*places[int(steps[1])], *steps[2:]) if steps[0] == ADDED else steps


def _written_leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of everything that was written; a part that is only a name as `adapter.name`."""
    for name, value in tree.items():
        if name in FIELDS and not isinstance(value, Mapping):
            yield f"{name}.name", bare_value(value)
        elif name in (*FIELDS, "model", "data") and isinstance(value, Mapping):
            yield from ((f"{name}.{key}", bare_value(inner)) for key, inner in value.items())
        else:
            yield name, bare_value(value)


def _size_batch(tree: dict[str, Any]) -> None:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    size, steps = (structure_value(tree.get(name), int | None, name) for name in names)
    product = batch_product(size, steps)
    if product is not None:
        tree.setdefault("global_batch_size", product)


def _listed_parts(tree: dict[str, Any], attempt: Callable[..., Any], plugins: Plugins) -> dict[str, list[Any]]:
    """Return the settings that are lists of parts; one that cannot be read counts as a part, and no rule misses it.

    Each part is looked up, so that an error names its file and line. The names of objects that a run's recipe recorded
    stand for nothing that could be found.
    """
    lists = {name: attempt(functools.partial(read_parts, tree, name, plugins)) for name in LISTS}
    for name, kind in LISTS.items():
        parts = [
            attempt(functools.partial(find_part, entry, kind, f"{name}.{index}", plugins))
            for index, entry in enumerate(lists[name] or ())
            if not (isinstance(entry, Mapping) and "local" in entry)
        ]
        if name == "penalties" and None not in parts:
            attempt(functools.partial(check_repeated, parts))
    return {name: ["unreadable"] if entries is None else entries for name, entries in lists.items()}


def _found_part(tree: dict[str, Any], kind: str, plugins: Plugins) -> Any:
    """Return a part field's options object, which may be the default's, or the caller's own object."""
    value = tree.get(kind, default_of(kind))
    return None if is_absent(kind, value) else _held(find_part(value, kind, kind, plugins))


def _held(part: Part) -> Any:
    """Return the value of a part field: the caller's object, the options, or the name of a part without options."""
    if part.local is not None:
        return part.local
    return part.name if isinstance(part.options, NoOptions) else part.options
