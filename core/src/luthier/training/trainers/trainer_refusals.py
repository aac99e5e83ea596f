"""Checks of a recipe with a trainer: a setting that nothing would read is refused by its name, before any work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from luthier.data.source_shares import are_plain
from luthier.errors import LuthierError, suggest_nearest
from luthier.hardware import devices
from luthier.plugins.completion import has_default
from luthier.recipe import Recipe, resolve_parts
from luthier.recipe.checks.soundness import check_parts
from luthier.recipe.checks.unread_options import default_value
from luthier.recipe.parts import FIELDS, Part, Resolved, part_identity
from luthier.recipe.schema import Data, Settings, setting_names

# settings that the core reads for every trainer: the parts, the folders, and the form of the files
READ: Final = frozenset(
    (
        *(kind for kind in FIELDS if kind != "loss"),
        *("model", "data", "callbacks", "penalties", "adapter_from", "output_dir", "run_name"),
        *("merge", "seed", "device"),
        *("save_dtype", "max_shard_size", "save_steps", "save_samples", "save_final", "save_total_limit"),
    )
)
READ_DATA: Final = frozenset(("train", "validation"))
# members of an adapter that only Luthier's own steps call
OWN_STEPS: Final = {"virtual_tokens": "adds virtual tokens", "prefixes": "adds keys and values"}


def check_trainer(recipe: Recipe) -> Resolved:
    """Return the parts of a recipe that names a trainer, once nothing in it is found that would not be done."""
    resolved = resolve_parts(recipe)
    part = resolved.trainer
    assert part is not None, "the recipe names a trainer"
    check_parts(recipe, resolved, devices.choose_device(recipe.device).type)
    _check_settings(recipe, resolved, part)
    _check_adapter(part, resolved)
    if getattr(resolved.quantizer.record or resolved.quantizer.local, "trains", False):
        raise _unsupported(
            part, "quantizer", f"quantizer {resolved.quantizer.name!r} is trained by Luthier's own steps"
        )
    for number, penalty in enumerate(resolved.penalties):
        if getattr(penalty.record or penalty.local, "over", "weights") == "tokens":
            raise _unsupported(
                part, f"penalties.{number}", f"penalty {penalty.name!r} asks the policy in Luthier's own steps"
            )
    resolved.build(part).check(recipe)
    return resolved


def _check_settings(recipe: Recipe, resolved: Resolved, part: Part) -> None:
    """Raise `recipe-conflict` for a setting that is given, beside its default, and that this trainer does not read."""
    listed = getattr(part.record or part.local, "settings", ())
    _refuse_unknown(listed, part.name)
    for place, sources in (("data.train", recipe.data.train), ("data.validation", recipe.data.validation)):
        if isinstance(sources, list) and not are_plain(sources):
            problem = f"trainer {part.name!r} reads the prompts of each source once: no share, repeat or weight"
            raise LuthierError("recipe-conflict", problem, where=place, remedy="Leave them out.")
    read = {*READ, *listed}
    owners: tuple[tuple[str, type, Any, frozenset[str]], ...] = (
        ("", Settings, recipe, frozenset(name for name in read if "." not in name)),
        ("data.", Data, recipe.data, READ_DATA | {name[5:] for name in read if name.startswith("data.")}),
    )
    for prefix, cls, owner, known in owners:
        for name in cls.__annotations__:
            value = getattr(owner, name)
            if name in known or _is_default(cls, name, value, resolved):
                continue
            problem = f"nothing reads it: trainer {part.name!r} has no such setting"
            raise LuthierError("recipe-conflict", problem, where=f"{prefix}{name}", found=_shown(value),
                               remedy="Leave it out.")  # fmt: skip


def _refuse_unknown(listed: Iterable[str], trainer: str) -> None:
    """Raise `plugin-invalid` for a setting that no recipe has: it would be refused although the trainer reads it."""
    known = setting_names()
    for name in listed:
        if name not in known:
            raise LuthierError("plugin-invalid", "no recipe has this setting", where=f"trainer {trainer}: settings",
                               found=name, remedy=suggest_nearest(name, known))  # fmt: skip


def _is_default(cls: type, name: str, value: Any, resolved: Resolved) -> bool:
    default = default_value(cls, name)
    if cls is Settings and name in FIELDS:
        return bool(part_identity(value, name, resolved.plugins) == part_identity(default, name, resolved.plugins))
    return bool(value == default)


def _shown(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) else type(value).__name__


def _check_adapter(part: Part, resolved: Resolved) -> None:
    adapter = resolved.build(resolved.adapter)
    for name, act in OWN_STEPS.items():
        if not has_default(adapter, "adapter", name):
            problem = f"adapter {resolved.adapter.name!r} {act} in Luthier's own steps"
            raise _unsupported(part, "adapter", problem)


def _unsupported(part: Part, where: str, problem: str) -> LuthierError:
    remedy = "Leave it out." if where.startswith("penalties") else f"Choose another {where}."
    return LuthierError("part-unsupported", f"{problem}, and trainer {part.name!r} takes its own", where=where,
                        remedy=remedy)  # fmt: skip
