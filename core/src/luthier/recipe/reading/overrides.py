"""Values from outside the recipe's file: free flags, `--set`, `LUTHIER_*` variables, and keyword arguments."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from luthier.error_lists import join_errors
from luthier.errors import LuthierError, suggest_nearest
from luthier.plugins.fields.hints import field_hints
from luthier.plugins.structure import Written
from luthier.recipe.parts import FIELDS
from luthier.recipe.reading import yaml12
from luthier.recipe.reading.aliases import ALIASES, READINGS
from luthier.recipe.reading.callback_list import EXACT
from luthier.recipe.reading.foreign_keys import find_remedy, list_part_options
from luthier.recipe.reading.trackers import REPORT
from luthier.recipe.schema import Data, Model, Settings

PREFIX: Final = "LUTHIER_"
FREE_PREFIX: Final = "LUTHIER_X_"  # reserved for other programs: no variable of luthier will ever begin like this
RESERVED: Final = frozenset(
    {"LUTHIER_DISABLE_PLUGINS", "LUTHIER_DATA", "LUTHIER_EXAMPLES", "LUTHIER_CACHE", "LUTHIER_JOBS"}
)
FREE: Final = ("columns", "template", "lr_scheduler_kwargs")  # settings whose inner keys the user chooses


@attrs.frozen(kw_only=True)
class Override:
    """A value for a dotted path. `label` is how the user wrote it: `--adapter.r`, `LUTHIER_ADAPTER__R`."""

    steps: tuple[str, ...]
    value: Any
    label: str = ""


def parse_flags(arguments: Sequence[str], own: Sequence[str] = ()) -> list[Override]:
    """Return flags such as `--adapter lora --adapter.r 16 --learning-rate=1e-4 --no-packing` as overrides.

    Names are in kebab-case or snake_case. A switch without a value is true, `--no-x` is false. `own` holds the
    command's own flags, for hints. Raises `recipe-missing`, `recipe-unknown-option` or, for a flag given twice,
    `recipe-conflict`; all flags' errors at once.
    """
    overrides: dict[tuple[str, ...], Override] = {}
    errors: list[LuthierError] = []
    for flag, text in _pairs(list(arguments)):
        try:
            override = _flag(flag, text, own)
            if override.steps in overrides:
                remedy = f"Give it once; a list is written {flag} '[a, b]'."
                raise LuthierError("recipe-conflict", "is given twice", where=flag, found=text, remedy=remedy)
        except LuthierError as error:
            errors.append(error)
        else:
            overrides[override.steps] = override
    if errors:
        raise join_errors(errors)
    return list(overrides.values())


def parse_sets(settings: Sequence[str]) -> list[Override]:
    """Return settings `a.b=c`, as `--set` takes them, as overrides."""
    return [_setting(text) for text in settings]


def from_environment(environ: Mapping[str, str]) -> list[Override]:
    """Return every `LUTHIER_A__B=c` as an override of `a.b`.

    Raises an error with the nearest name for an unknown one.
    """
    names = sorted(name for name in environ if name.startswith(PREFIX) and not _is_reserved(name))
    return [_variable(name, environ[name]) for name in names]


def _is_reserved(name: str) -> bool:
    """Return True if a variable belongs to no option: one for luthier's folders, or any of `LUTHIER_X_*`."""
    return name in RESERVED or name.startswith(FREE_PREFIX)


def from_python(overrides: Mapping[str, Any]) -> list[Override]:
    """Return overrides from dotted paths and values, as keyword arguments give them."""
    return [Override(steps=tuple(name.split(".")), value=value) for name, value in overrides.items()]


def parse_value(text: str) -> Any:
    """Return text read as a YAML 1.2 scalar or flow collection.

    Other values than text keep their spelling for text options.
    """
    try:
        value, _ = yaml12.load_yaml(text, "")
    except LuthierError:
        return text
    plain = text.strip()
    if plain[:1] in ("'", '"'):
        return value
    if isinstance(value, str) or ("#" in plain and not isinstance(value, (list, dict))):
        return plain  # YAML's reading would end at a comment
    return Written(text, _written(value))


def _written(value: Any) -> Any:
    """Return a list or mapping whose items keep their spelling, so that `[1, 2]` can be a list of names."""
    if isinstance(value, dict):
        return {k: _item(v) for k, v in value.items()}
    return [_item(v) for v in value] if isinstance(value, list) else value


def _item(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        return _written(value)
    return value if isinstance(value, str) or value is None else Written(_spelled(value), value)


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _pairs(arguments: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each flag with its value; None if no value follows."""
    while arguments:
        flag = arguments.pop(0)
        if not flag.startswith("--") or flag == "--":
            remedy = "Options begin with --; quote a value that holds spaces."
            raise LuthierError("recipe-unknown-option", "unexpected argument", where=flag, remedy=remedy)
        name, equals, text = flag.partition("=")
        if equals:
            yield name, text
        elif arguments and not arguments[0].startswith("--") and not _is_switch(name, arguments[0]):
            yield name, arguments.pop(0)
        else:
            yield name, None


def _is_switch(flag: str, text: str) -> bool:
    """Return True if a flag needs no value: `--no-packing`, or a true-or-false option before a word of another kind."""
    steps = _steps(flag[2:])
    if _negated(steps):
        return True
    return len(steps) == 1 and field_hints(Settings).get(steps[0]) is bool and text.lower() not in ("true", "false")


def _flag(flag: str, text: str | None, own: Sequence[str]) -> Override:
    steps = _steps(flag[2:])
    if _negated(steps):
        if text is not None:
            remedy = f"Write {flag} alone, or --{flag[5:]} {text}."
            raise LuthierError("recipe-conflict", "takes no value", where=flag, found=text, remedy=remedy)
        return Override(steps=(steps[0].removeprefix("no_"), *steps[1:]), value=False, label=flag)
    _refuse_unknown(steps, flag, own)
    if text is None and not _may_be_true(steps):
        raise LuthierError("recipe-missing", "needs a value", where=flag, remedy=f"Write {flag} VALUE.")
    return Override(steps=steps, value=True if text is None else parse_value(text), label=flag)


def _may_be_true(steps: tuple[str, ...]) -> bool:
    """Return True if a flag can be without value. Aliases and parts' options can; their type is checked later."""
    if len(steps) == 1:
        return field_hints(Settings).get(steps[0], bool) is bool
    return steps[0] not in SECTIONS


def _negated(steps: tuple[str, ...]) -> bool:
    return steps[0].startswith("no_") and _is_known((steps[0][3:], *steps[1:])) and not _is_known(steps)


def _setting(text: str) -> Override:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise LuthierError("recipe-missing", "expected a.b=value", where="--set", found=text)
    steps = _steps(name.strip())
    _refuse_unknown(steps, f"--set {name.strip()}")
    return Override(steps=steps, value=parse_value(value), label=f"--set {name.strip()}")


def _variable(name: str, text: str) -> Override:
    steps = tuple(name.removeprefix(PREFIX).lower().split("__"))
    if not _is_known(steps):
        known = [PREFIX + "__".join(path).upper() for path in _known()]
        remedy = suggest_nearest(name, [*known, *RESERVED])
        raise LuthierError("recipe-unknown-option", "this variable belongs to no option", where=name,
                           remedy=remedy if remedy.startswith("Did") else "Unset it.")  # fmt: skip
    return Override(steps=steps, value=parse_value(text), label=name)


def _steps(name: str) -> tuple[str, ...]:
    """Return a dotted name in snake_case. Keys inside a part's option, or of a free mapping, keep their spelling."""
    steps = name.split(".")
    for depth, step in enumerate(steps):
        steps[depth] = step.replace("-", "_")
        if steps[depth] in FREE or (steps[0] in FIELDS and depth == 1):
            break
    return tuple(steps)


def _refuse_unknown(steps: tuple[str, ...], label: str, own: Sequence[str] = ()) -> None:
    """Raise `recipe-unknown-option` with the nearest of our names. Other tools' names are read, but never suggested."""
    if _is_known(steps):
        return
    foreign = find_remedy(".".join(steps))
    if foreign:
        raise LuthierError("recipe-unknown-option", foreign[0], where=label, remedy=foreign[1])
    known = {".".join(path): ".".join(path) for path in _known()}
    known |= {flag.removeprefix("--").replace("-", "_"): flag for flag in own}
    near = [known[name] for name in difflib.get_close_matches(".".join(steps), known, n=2, cutoff=0.6)]
    near = list_part_options(steps) or near
    remedy = f"Did you mean {' or '.join(map(repr, near))}?" if near else "List them with --help."
    raise LuthierError("recipe-unknown-option", "there is no such option", where=label, remedy=remedy)


def _is_known(steps: tuple[str, ...]) -> bool:
    """Return True if the first step, and the second one of model and data, are options or aliases."""
    dotted = ".".join(steps)
    if dotted in ALIASES or dotted in READINGS or steps[0] in ("batch_size", "train_batch_size", EXACT, REPORT):
        return True
    if steps[0] in SECTIONS and len(steps) > 1:
        return steps[1] in field_hints(SECTIONS[steps[0]])
    return steps[0] in field_hints(Settings) or steps[0] in ALIASES


def _known() -> list[tuple[str, ...]]:
    inner = [(name, option) for name, cls in SECTIONS.items() for option in field_hints(cls)]
    return [*((name,) for name in field_hints(Settings)), *inner]


SECTIONS: Final[dict[str, type]] = {"model": Model, "data": Data}
