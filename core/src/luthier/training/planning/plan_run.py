"""The plan: what a run would be, without its weights: parts, parameters, memory by cause, steps, packing, time."""

from __future__ import annotations

from typing import Any, Final

import attrs

from luthier.data.formats.wanted import Wanted
from luthier.data.prepare import Prepared
from luthier.distributed.world import World
from luthier.errors import LuthierError
from luthier.hardware import threads
from luthier.hardware.peak_memory import process_memory
from luthier.memory.case import OPTION, Case
from luthier.memory.counts import held_memory, parameters_of
from luthier.memory.dry_run import Footprint, Unknown, stand_in
from luthier.memory.duration import estimate_duration
from luthier.memory.fit import choose_tokens, fullest_batches, list_suggestions, suggest_numbers
from luthier.model import load
from luthier.model.model_config import config_of
from luthier.model.weights.parameter_groups import describe_groups
from luthier.model.weights.quantized import find_trained
from luthier.model.weights.stored_layers import is_stored
from luthier.plugins.contracts.protocols import Loss
from luthier.randomness import keep_randomness
from luthier.recipe import Recipe
from luthier.recipe.checks.soundness import check_stored_base
from luthier.recipe.objects import Objects
from luthier.recipe.parts import Resolved, resolve_parts
from luthier.recipe.rowless import NO_ROWS
from luthier.runs.writing.decisions import Decisions
from luthier.step import compile_step as compiling
from luthier.step.attach import trained_groups
from luthier.step.fit_checks import check_fit, check_rooms, check_tokens
from luthier.step.reference.company import Company
from luthier.step.setup import Setup
from luthier.training.assemble import assemble_run, usable_device
from luthier.training.planning.disk_numbers import predict_disk
from luthier.training.planning.plan_numbers import packing_of, schedule_of
from luthier.training.process_choice import settle_process
from luthier.training.rows import prepared_data

STEPS: Final = 1000  # steps that are searched for the fullest micro-batch
FILLING: Final = "the most memory is taken before the first step, by the passes over the rows that fill a cache"
BOUNDED: Final = "is decided from numbers that a plan does not read: what it decides is taken as large as it can be"


@attrs.frozen(kw_only=True)
class Plan:
    """Plain numbers; bytes for memory, tokens for lengths. `notes` says what was assumed or could not be known."""

    parts: list[dict[str, Any]]
    parameters: dict[str, dict[str, int]]  # by module kind: total, trainable
    memory: dict[str, int]  # the predicted peak by cause, and the total
    schedule: dict[str, Any]
    packing: dict[str, float]
    coverage: dict[str, Any]
    data: dict[str, Any]
    decisions: dict[str, Any] = attrs.field(factory=dict)  # name -> value and reason
    operations: list[str] = attrs.field(factory=list)  # `operation: implementation` of each that a step uses
    groups: list[dict[str, Any]] = attrs.field(factory=list)  # parameters that share a rate
    device: dict[str, Any] = attrs.field(factory=dict)  # the device's memory, and whether the peak fits
    time: dict[str, Any] = attrs.field(factory=dict)  # an estimate, with its basis
    disk: dict[str, int] = attrs.field(factory=dict)  # the predicted bytes of the run's files by kind, and the total
    suggestions: list[dict[str, Any]] = attrs.field(factory=list)  # option, value and reason
    notes: list[str] = attrs.field(factory=list)

    def to_dict(self) -> dict[str, Any]:
        return attrs.asdict(self)


def plan(recipe: Recipe, objects: Objects) -> Plan:
    """Check everything, and rehearse the run without its weights; they are read only for a part that needs them."""
    notes: list[str] = []
    decisions, began = Decisions(), threads.Glance()
    with keep_randomness():
        resolved = resolve_parts(recipe)
        device = usable_device(recipe, resolved, World())
        for part in resolved.callbacks:
            resolved.build(part)  # reports here what the part lacks
        if objects.model is None and find_trained(recipe.model.name_or_path) is None:
            load.check_named_model(recipe.model)
        prepared, tokenizer = _rows(recipe, objects, resolved, notes)
        loss = resolved.build(resolved.loss)
        company = _checked_company(recipe, objects, resolved, loss, tokenizer)
        case = Case(recipe=recipe, resolved=resolved, loss=loss, device=device, packing=recipe.packing,
                    prepared=prepared or stand_in(recipe), objects=objects)  # fmt: skip
        check_rooms(case.prepared, recipe.data, case.tokens, case.layout)
        case = suggest_numbers(case, decisions)
        if case.tokens is None:
            case.numbers[OPTION] = _chosen(case, decisions, notes)
        setup, footprint = _tried(case, decisions, notes, company)
        notes.extend([*setup.companions.notes(), *(f"{name} {BOUNDED}" for name in setup.decisions.bounded)])
        _check_fit(prepared, tokenizer, setup)
        settle_process(setup, began)
        compiling.settle_compile(setup)
    plan_made = _found(case, setup, footprint, prepared is not None, notes)
    plan_made.decisions.update({**setup.decisions.to_dict(), **decisions.to_dict()})
    if footprint is None:  # the weights are loaded already, and may be the caller's
        setup.undo.close()
    return plan_made


def _found(case: Case, setup: Setup, footprint: Any, has_rows: bool, notes: list[str]) -> Plan:
    fits = footprint.peak <= case.room.free if footprint else None
    memory = _memory(setup, footprint)
    return Plan(
        parts=[part.describe() for part in case.resolved],
        parameters=parameters_of(setup.model, setup.adapter),
        memory=memory,
        schedule=schedule_of(setup) if has_rows else _unknown(setup),
        packing=packing_of(setup) if has_rows else {},
        coverage=setup.adapter.coverage() if hasattr(setup.adapter, "coverage") else {},
        data=case.prepared.report.to_dict(),
        device={**attrs.asdict(case.room), "fits": fits, "process": process_memory(case.device)},
        time=_time(setup, footprint) if has_rows and footprint else {},
        disk=predict_disk(setup, memory["optimizer"], case.task.total) if has_rows else {},
        operations=setup.operations.operations.ran(),
        groups=describe_groups(trained_groups(case.recipe, setup.adapter, setup.model)),
        suggestions=[attrs.asdict(suggestion) for suggestion in list_suggestions(case, setup.model, setup.adapter)],
        notes=notes,
    )


def _rows(recipe: Recipe, objects: Objects, resolved: Resolved, notes: list[str]) -> tuple[Prepared | None, Any]:
    """Return the rows with their tokenizer, or None where there are none, or nothing to count their tokens with."""
    assumed = f"memory is that of rows of {recipe.data.max_length:,} tokens (data.max_length)"
    if objects.data is None and recipe.data.train[0].path == NO_ROWS:
        notes.append(f"no rows are given: {assumed}")
        return None, None
    try:
        tokenizer = objects.tokenizer or load.tokenizer_of(recipe.model)
    except LuthierError as error:
        if error.code != "model-not-found" or recipe.model.tokenizer is not None:
            raise
        config_of(recipe.model)  # reports here if there is no model
        notes.append(f"the rows are not counted ({error.problem}): {assumed}")
        return None, None
    return prepared_data(recipe, objects, tokenizer, Wanted.of_part(resolved.loss)), tokenizer


def _check_fit(prepared: Prepared | None, tokenizer: Any, setup: Setup) -> None:
    for dataset in (prepared.train, prepared.validation) if prepared else ():
        if dataset is not None:
            check_fit(dataset, tokenizer, setup.model)
    if prepared is not None:
        check_tokens(setup)


def _chosen(case: Case, decisions: Decisions, notes: list[str]) -> int:
    """Return the number that `auto` stands for; the smallest possible one if nothing fits."""
    try:
        return decisions.take(OPTION, lambda: choose_tokens(case))
    except LuthierError as error:
        if error.code != "memory-too-small":
            raise
        notes.append(error.problem)
        return decisions.explicit(OPTION, case.longest, "the longest example, though not even that fits")


def _checked_company(recipe: Recipe, objects: Objects, resolved: Resolved, loss: Loss, tokenizer: Any) -> Company:
    """Return what stands beside the policy; its vocabularies are checked where the model's is known."""
    company = Company.of(recipe, resolved, begins=True)
    if tokenizer is None:
        return company
    config = config_of(recipe.model) if objects.model is None else objects.model.config
    if is_stored(config):
        check_stored_base(resolved.chosen())
    return company.checked(loss, tokenizer, config)


def _tried(case: Case, decisions: Decisions, notes: list[str], company: Company) -> tuple[Setup, Footprint | None]:
    """Return the run's setup and a step's memory, tried on fake tensors, or on weights if a part needs them."""
    try:
        rehearsal = case.rehearsal
        setup = rehearsal.setup
        rehearsal.start_from(company.start)
        setup.packing = attrs.evolve(setup.packing, max_tokens=case.settle().max_tokens_per_device)
        footprint = case.footprint(fullest_batches(setup.feed, setup.packing, setup.train, STEPS))
        notes.extend([FILLING] if footprint.fills_cache else [])
        return setup, footprint
    except Unknown as error:
        notes.append(f"the weights were loaded, and what a step needs is not predicted: {error}")
        recipe = attrs.evolve(case.settle(), memory_check=False)
        objects = attrs.evolve(case.objects, prepared=case.prepared)
        return assemble_run(recipe, objects, decisions=decisions).setup, None


def _memory(setup: Setup, footprint: Footprint | None) -> dict[str, int]:
    causes = _held(setup) if footprint is None else footprint.causes
    return {**causes, "total": sum(causes.values())}


def _held(setup: Setup) -> dict[str, int]:
    """Return the bytes by cause that the loaded run holds whatever its step does."""
    weights = (*setup.model.parameters(), *setup.model.buffers(), *setup.precision.kept)
    trainable = [p for group in setup.optimizer.param_groups for p in group["params"]]
    return held_memory(weights, trainable, setup.optimizer_part, setup.frozen_tensors())


def _unknown(setup: Setup) -> dict[str, Any]:
    """Return the schedule of a run whose rows are not known."""
    return {**dict.fromkeys(schedule_of(setup)), "total_steps": setup.recipe.max_steps,
            "peak_learning_rate": setup.rates.peak}  # fmt: skip


def _time(setup: Setup, footprint: Footprint) -> dict[str, Any]:
    """Return an estimate of the whole run's time, if its tokens are known."""
    schedule = schedule_of(setup)
    if schedule["epochs"] is None:
        return {}
    tokens = schedule["tokens_per_epoch"] * schedule["epochs"]
    return estimate_duration(footprint.flops_per_token, tokens, setup.device, setup.model.dtype)
