"""Preparation: a recipe becomes a job that is checked, converted and priced, before anything leaves this machine."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.errors import LuthierError, suggest_nearest
from luthier.jobs.making.price_estimate import check_cost, estimate_cost, read_own_prices
from luthier.jobs.making.sent_settings import check_method, select_settings
from luthier.jobs.restoring import ReadyProvider
from luthier.jobs.rows.row_files import write_row_files
from luthier.plugins.providing.job_records import Capabilities, CostEstimate, Finding, JobSpec
from luthier.plugins.registry import installed_plugins
from luthier.recipe import Recipe
from luthier.recipe.parts import Part, find_part
from luthier.recipe.reading.read_recipe import Reading

LETTERS: Final = "abcdefghijkmnpqrstuvwxyz23456789"  # without letters and digits that look alike
PAIRED: Final = "preference"


@attrs.frozen(kw_only=True)
class PreparedJob:
    """A job that could be submitted, the findings about it, and its estimated cost."""

    spec: JobSpec
    findings: list[Finding]
    cost: CostEstimate | None


def new_job_id(now: float) -> str:
    """Return an id that begins with the time and ends with ten random characters (50 bits)."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    return f"{stamp}-{''.join(secrets.choice(LETTERS) for _ in range(10))}"


def make_room(folder: Path, now: float) -> Path:
    """Make the folder of a new job, named by its id, and return it."""
    room = folder / "jobs" / new_job_id(now)
    room.mkdir(parents=True, mode=0o700)
    return room


async def prepare_job(
    reading: Reading, ready: ReadyProvider, room: Path, now: float, max_cost: float | None = None
) -> PreparedJob:
    """Write the job's files into its folder, and return the job. At most its price is asked for.

    Raises the first of all errors, with the others in its text.
    """
    recipe, part = reading.recipe, ready.part
    loss = find_part(recipe.loss, "loss", "loss", installed_plugins())
    capabilities = await part.capabilities(recipe.model.name_or_path)
    output_dir = Path(recipe.output_dir or f"runs/{room.name}").absolute()
    spec = JobSpec(
        id=room.name,
        provider=ready.name,
        options=ready.options or {},
        scope=part.scope(),
        model=recipe.model.name_or_path,
        method=loss.name,
        settings={},
        folder=room,
        output_dir=output_dir,
        created=now,
        max_cost=max_cost,
    )
    _write_recipe(attrs.evolve(recipe, output_dir=str(output_dir)), room)
    if capabilities.takes == "recipe":
        findings = list(await part.validate(spec))
        raise_refusals(findings, ready.name)
        return PreparedJob(spec=spec, findings=findings, cost=await _ask_price(spec, ready))
    return await _prepare_rows(reading, loss, spec, ready, capabilities)


async def _ask_price(spec: JobSpec, ready: ReadyProvider) -> CostEstimate | None:
    """Return the price that the provider states for a recipe. Raises `cost-above` if it is more than is allowed."""
    price = await ready.part.estimate(spec, {})
    if price is not None:
        check_cost(price, spec.max_cost)
    return price


async def _prepare_rows(
    reading: Reading, loss: Part, spec: JobSpec, ready: ReadyProvider, capabilities: Capabilities
) -> PreparedJob:
    """Convert the rows for a service that takes them, and price the job."""
    settings, findings = select_settings(reading.given, capabilities, loss.name)
    findings = [*check_method(loss.name, capabilities), *findings]
    raise_refusals(findings, ready.name)
    pairs = getattr(loss.record, "data", "tokens") == PAIRED
    recipe, rules = reading.recipe, capabilities.rules
    files, report = write_row_files(
        recipe.data, spec.folder, pairs=pairs, seed=recipe.seed, rules=rules, encode=ready.part.encode
    )
    report.raise_errors()
    spec = attrs.evolve(spec, settings=settings, files=files)
    findings += [*report.warnings, *_validation_refused(spec, capabilities), *await ready.part.validate(spec)]
    raise_refusals(findings, ready.name)
    cost = estimate_cost(spec, capabilities, read_own_prices(spec.folder.parent.parent, ready.name))
    check_cost(cost, spec.max_cost)
    return PreparedJob(spec=spec, findings=[*findings, *_model_notes(spec, capabilities)], cost=cost)


def raise_refusals(findings: Sequence[Finding], provider: str) -> None:
    """Raise `provider-unsupported` with every error among the findings, if there is one."""
    errors = [f for f in findings if f.level == "error"]
    if not errors:
        return
    first, *others = errors
    listed = "".join(f"; {f.where}: {f.message}" if f.where else f"; {f.message}" for f in others)
    raise LuthierError("provider-unsupported", f"{provider}: {first.message}{listed}", where=first.where)


def _write_recipe(recipe: Recipe, room: Path) -> None:
    """Write the recipe as it will train: with absolute paths, and without the provider, as it then runs locally."""
    attrs.evolve(recipe, provider="local").write(room / "recipe.yaml")


def _validation_refused(spec: JobSpec, capabilities: Capabilities) -> list[Finding]:
    if "validation" not in spec.files or capabilities.validation_file:
        return []
    message = "the service takes no validation rows"
    return [Finding(level="error", rule="setting", message=message, where="data.validation")]


def _model_notes(spec: JobSpec, capabilities: Capabilities) -> list[Finding]:
    notes = [Finding(level="warning", rule="notice", message=text) for text in capabilities.notices]
    known = capabilities.known_models
    if known and spec.model not in known:
        message = f"{spec.model} is not among the models known here; the service decides."
        message += f" {suggest_nearest(spec.model, known)}"
        notes.append(Finding(level="note", rule="model", message=message, where="model"))
    return notes


def plain_findings(findings: Sequence[Finding]) -> list[Mapping[str, Any]]:
    """Return findings as plain data that JSON can hold."""
    return [attrs.asdict(finding) for finding in findings]
