"""Checks of every part: its record, its options, its entry module, and the protocol of its kind."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.plugins.completion import list_members
from luthier.plugins.contracts.protocols import PROTOCOLS
from luthier.plugins.options import KEY
from luthier.plugins.records import NoOptions, Record
from luthier.plugins.registry import installed_plugins
from luthier.plugins.structure import structure_value
from luthier.testing import event_orders as events
from luthier.testing.laws import CHECKS, KINDS, Subject, law

LIBRARIES: Final = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "torchao")
CLIENTS: Final = (
    "wandb",
    "mlflow",
    "tensorboard",
    "tensorboardX",
    "comet_ml",
    "trackio",
    "openai",
    "together",
    "tinker",
)
WIDEST: Final = 120  # the most characters of a summary in a line of `luthier plugins`


@law(0, needs_torch=False)
def name_is_unique(subject: Subject) -> None:
    """No other record of the plugin, and no other installed distribution, has the same kind and name."""
    record = subject.record
    same = [r for r in subject.together if (r.kind, r.name) == (record.kind, record.name)]
    assert len(same) == 1, f"{len(same)} records of this plugin are {record.kind} {record.name!r}"
    claims = [o for o in installed_plugins().offers(record.kind) if o.record.name == record.name]
    others = [s for o in claims for s in (o.source, *o.rivals) if o.rivals or o.record != record]
    assert not others, f"{record.kind} {record.name!r} is also claimed by {', '.join(map(str, others))}"


@law(0, needs_torch=False, when=lambda record: record.options is not NoOptions)
def options_class_is_its_own(subject: Subject) -> None:
    """The options class belongs to this part alone, because in Python `Lora(r=16)` names its part."""
    record = subject.record
    if isinstance(record.options, str):
        return
    everyone = [*subject.together, *(o.record for o in installed_plugins().offers())]
    sharing = {f"{r.kind} {r.name!r}" for r in everyone if r.options is record.options and r != record}
    assert not sharing, f"{record.options.__name__} is also the options class of {', '.join(sorted(sharing))}"


@law(0, needs_torch=False)
def summary_is_one_line(subject: Subject) -> None:
    """The summary describes the part in one line that fits a table."""
    summary = subject.record.summary
    assert summary == summary.strip() and "\n" not in summary, f"not one trimmed line: {summary!r}"
    assert len(summary) <= WIDEST, f"{len(summary)} characters; at most {WIDEST} fit a line"
    assert summary.rstrip(".").lower() != subject.record.name, "the summary only repeats the name"


@law(needs_torch=False)
def options_are_frozen_and_described(subject: Subject, options: Any) -> None:
    """Options are a frozen class with keyword arguments, every field made by `luthier.option` with a help text."""
    name = type(options).__name__
    for field in attrs.fields(type(options)):
        bounds = field.metadata.get(KEY)
        assert bounds is not None, f"{name}.{field.name} is not made by luthier.option(...)"
        assert bounds.help.strip(), f"{name}.{field.name} has no help"
        assert field.kw_only, f"{name}.{field.name} can be given by position; use attrs.frozen(kw_only=True)"
        try:
            setattr(options, field.name, getattr(options, field.name))
        except attrs.exceptions.FrozenInstanceError:
            continue
        raise AssertionError(f"{name}.{field.name} can be changed; use attrs.frozen(kw_only=True)")


@law(needs_torch=False)
def options_survive_a_round_trip(subject: Subject, options: Any) -> None:
    """Options that are written into a recipe and read again are equal to the original."""
    written = json.loads(json.dumps(attrs.asdict(options, value_serializer=_plain)))
    read = structure_value(written, type(options), type(options).__name__)
    assert read == options, f"{options!r} came back as {read!r}"


def _plain(instance: Any, attribute: Any, value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@law(0, needs_torch=False)
def import_needs_no_torch(subject: Subject) -> None:
    """Importing the modules that an entry point or a recipe loads imports no heavy library."""
    modules = sorted(entry_modules(subject.record))
    script = f"import importlib, sys; [importlib.import_module(m) for m in {modules!r}]; print('|'.join(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"importing {', '.join(modules)} alone fails:\n{done.stderr.strip()}"
    heavy = sorted({name for name in (*LIBRARIES, *CLIENTS) if name in done.stdout.strip().split("\n")[-1].split("|")})
    assert not heavy, f"importing {', '.join(modules)} imports {', '.join(heavy)}; move that to the module of `build`"


def entry_modules(record: Record) -> set[str]:
    """Return the modules that are imported to list the part: its entry point's, and that of its options."""
    offered = {o.source.module for o in installed_plugins().offers(record.kind) if o.record == record}
    if isinstance(record.options, str):
        return offered or {record.build.partition(":")[0].partition(".")[0]}
    return offered | {record.options.__module__} - {"__main__"}


@law(5)
def build_keeps_the_protocol(subject: Subject, options: Any) -> None:
    """The object that `build` returns has every member of its kind's protocol, and each accepts its arguments."""
    part = subject.build(options)
    kind = subject.record.kind
    if kind == "callback":
        events.connect_parts([part])
        events.heard_events(part)
    if kind == "loss":
        _check_loss(part, subject.record)
    protocol = PROTOCOLS.get(kind)
    for name in list_members(kind) if protocol is not None else ():
        member = getattr(protocol, name, None)
        if inspect.isfunction(member):
            wanted = inspect.signature(member)
            _check_arguments(f"{type(part).__name__}.{name}", getattr(part, name), len(wanted.parameters) - 1)


def _check_loss(part: Any, record: Any) -> None:
    assert part.data == record.data, f"the part's data is {part.data!r}, the record's {record.data!r}"
    couples = getattr(part, "couples", "nothing")
    assert couples in ("nothing", "batch"), f"couples is 'nothing' or 'batch', not {couples!r}"
    missing = [n for n in ("scores", "combine") if couples == "batch" and not hasattr(part, n)]
    assert not missing, f"a loss that couples the batch needs {' and '.join(missing)}"


def _check_arguments(where: str, method: Any, count: int) -> None:
    try:
        signature = inspect.signature(method)
    except ValueError:  # a builtin does not describe its arguments
        return
    try:
        signature.bind(*[None] * count)
    except TypeError as error:
        raise AssertionError(f"{where}{signature} is called with {count} positional arguments: {error}") from None


@law(0, when=lambda record: record.kind in KINDS)
def every_option_is_read(subject: Subject) -> None:
    """Each option is read at least once while the part is built, trained, saved and so on under several options.

    An option that nothing reads has no effect. The reverse is not proved: an option that is read may still do nothing.
    """
    from luthier.testing.running import sample_options

    live = importlib.import_module(CHECKS[subject.record.kind]).live
    unread = {field.name for field in attrs.fields(subject.options_class)}

    def life(subject: Subject, options: Any) -> None:
        watched, seen = spied(options)
        live(subject, watched)
        unread.difference_update(seen)

    if unread:
        sample_options(subject, life, 5)
    assert not unread, f"nothing reads {', '.join(sorted(unread))} of {subject.options_class.__name__}"


def spied(options: Any) -> tuple[Any, set[str]]:
    """Return equal options of a subclass, and the set to which it adds the name of each field that is read."""
    cls = type(options)
    fields = {field.name for field in attrs.fields(cls)}
    seen: set[str] = set()

    def get(self: Any, name: str) -> Any:
        if name in fields:
            seen.add(name)
        return object.__getattribute__(self, name)

    heir = type(cls.__name__, (cls,), {"__getattribute__": get, "__slots__": (), "__module__": cls.__module__})
    watched: Any = object.__new__(heir)
    for name in fields:
        object.__setattr__(watched, name, getattr(options, name))
    return watched, seen
