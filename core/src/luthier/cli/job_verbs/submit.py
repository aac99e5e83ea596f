"""`luthier submit` and `luthier estimate`: a recipe becomes a job, or is priced before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from luthier.cli.screen.answers import Answer, make_console
from luthier.cli.screen.flags import Json, LogFile, LogFormat, LogLevel
from luthier.cli.screen.recipe_arguments import Help, Sets, own_flags, show_help, split_words
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.jobs.making.preparing import PreparedJob
    from luthier.jobs.manager import Manager
    from luthier.jobs.store.job_store import JobStore
    from luthier.plugins.providing.job_records import JobSpec
    from luthier.recipe.reading.read_recipe import Reading

SUBMIT: Final = """Usage: luthier submit [RECIPE] [OPTIONS]

  Submit a recipe as a job: here (--provider local) or at a service. All is
  checked before anything is sent. Each submission makes one job, even if
  an answer is lost or the terminal is closed.

    luthier submit recipe.yaml --provider together --dry-run
    luthier submit recipe.yaml --provider together --wait
    luthier submit recipe.yaml --provider openai --max-cost 5"""
ESTIMATE: Final = """Usage: luthier estimate [RECIPE] --at PROVIDER [--at PROVIDER] [OPTIONS]

  Compare providers for a recipe: price, and what each refuses and why.
  Nothing is sent.

    luthier estimate recipe.yaml --at together --at openai"""
MaxCost = Annotated[float | None, typer.Option(help="Refuse a job that would cost more, or whose price is unknown.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, convert and price; send and store nothing.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until the job has ended; Ctrl-C leaves it running.")]
At = Annotated[list[str] | None, typer.Option("--at", metavar="PROVIDER", help="A provider to compare; several.")]


def submit(
    context: typer.Context, *, sets: Sets = None, wait: Wait = False, dry_run: DryRun = False, max_cost: MaxCost = None,
    help_: Help = False, json: Json = False, log_level: LogLevel = "warning", log_format: LogFormat = "console",
    log_file: LogFile = None,
) -> Any:  # fmt: skip
    """Submit a recipe as a job, here or at a service."""
    from luthier import logs
    from luthier.jobs.manager import Manager
    from luthier.jobs.sync_twins import run_plainly

    if help_:
        show_help(context, SUBMIT)
    logs.set_up(log_level, log_format, log_file)
    reading, manager = read_words(context, sets), Manager()
    try:
        if dry_run:
            return _would_send(run_plainly(manager.prepare(reading, max_cost=max_cost)))
        return _send_job(manager, reading, max_cost, wait=wait)
    finally:
        manager.close()


def _send_job(manager: Manager, reading: Reading, max_cost: float | None, *, wait: bool) -> Answer:
    """Submit the job, and follow it to its end where the user waits for it. Ctrl-C leaves it running."""
    from luthier.cli.screen.follow_job import follow_job, leaving_alone
    from luthier.cli.screen.jobs_view import draw_submitted

    named: list[str] = []

    def show_prepared(prepared: PreparedJob) -> None:
        named.append(prepared.spec.id)
        draw_findings(prepared)
        for other in find_alike(manager.store, prepared.spec):
            note = f"note: job {other} asks for the same, and had not ended when it was last seen; this is another one"
            make_console(stderr=True).print(note, style="yellow", soft_wrap=True)

    with leaving_alone(named):
        job = manager.submit_sync(reading, max_cost=max_cost, listener=show_prepared)
        message = f"submitted {job.id} to {job.spec.provider} as {job.remote_id}"
        make_console(stderr=True).print(message, soft_wrap=True)
    if wait:
        return follow_job(manager, job.id)
    return Answer(document={"job": job.to_dict()}, view=lambda screen: draw_submitted(screen, job))


def find_alike(store: JobStore, spec: JobSpec) -> list[str]:
    """Return the ids of the jobs of the same recipe and rows that had not ended when they were last seen."""
    wanted = _ask(spec)
    jobs = store.list_jobs(provider=spec.provider)
    return [job.id for job in jobs if not job.is_final and job.id != spec.id and _ask(job.spec) == wanted]


def _ask(spec: JobSpec) -> tuple[Any, ...]:
    """Return what a job asks for, the same for a second submission of a recipe."""
    rows = {role: file.sha256 for role, file in spec.files.items()}
    return spec.options, spec.scope, spec.model, spec.method, spec.settings, rows


def estimate(
    context: typer.Context, *, at: At = None, sets: Sets = None, max_cost: MaxCost = None, help_: Help = False,
    json: Json = False,
) -> Any:  # fmt: skip
    """Compare a recipe's cost at providers, and what they refuse."""
    from luthier.cli.screen.jobs_view import draw_estimates
    from luthier.jobs.manager import Manager
    from luthier.jobs.sync_twins import run_plainly

    if help_:
        show_help(context, ESTIMATE)
    _refuse_several(context.args)
    reading, manager = read_words(context, sets), Manager()
    try:
        names: list[str | None] = [*at] if at else [None]
        estimates = [run_plainly(_estimated(manager, reading, name, max_cost)) for name in names]
    finally:
        manager.close()
    return Answer(document={"estimates": estimates}, view=lambda screen: draw_estimates(screen, estimates))


def _would_send(prepared: PreparedJob) -> Answer:
    """Return the answer of a dry run: the job that would be sent, its price and the findings about it."""
    from luthier.cli.screen.jobs_view import draw_prepared
    from luthier.jobs.making.preparing import plain_findings
    from luthier.plugins.providing.job_records import to_plain_data

    draw_findings(prepared)
    spec = prepared.spec
    is_named = (
        spec.output_dir is not None and spec.output_dir.name != spec.id
    )  # otherwise after the job, when it exists
    files = [{"role": file.role, "rows": file.rows, "tokens": file.tokens, "bytes": file.size, "sha256": file.sha256}
             for file in spec.files.values()]  # fmt: skip
    document = {
        "provider": spec.provider, "scope": spec.scope, "model": spec.model, "method": spec.method,
        "settings": dict(spec.settings), "output_dir": str(spec.output_dir) if is_named else None, "files": files,
        "cost": to_plain_data(prepared.cost) if prepared.cost else None, "findings": plain_findings(prepared.findings),
    }  # fmt: skip
    return Answer(document={"prepared": document}, view=lambda screen: draw_prepared(screen, document))


def _refuse_several(words: Sequence[str]) -> None:
    """Raise `usage` where `--provider`, which sets the recipe's one provider, is given for several to compare."""
    if sum(word.partition("=")[0] == "--provider" for word in words) > 1:
        problem, remedy = "it sets the recipe's one provider", "Name each provider to compare with --at."
        raise LuthierError("usage", problem, where="--provider", remedy=remedy)


def read_words(context: typer.Context, sets: Sequence[str] | None) -> Reading:
    """Return the recipe that a command line means, and print its notes."""
    from luthier.recipe import load_recipe, parse_flags, parse_sets

    path, flags = split_words(context.args)
    reading = load_recipe(path, [*parse_flags(flags, own_flags(context)), *parse_sets(sets or ())])
    for note in reading.notes:
        make_console(stderr=True).print(f"note: {note}", style="yellow", soft_wrap=True)
    return reading


def draw_findings(prepared: PreparedJob) -> None:
    """Print, on standard error, what the user should know before the job is sent."""
    screen = make_console(stderr=True)
    for finding in prepared.findings:
        place = f"{finding.where}: " if finding.where else ""
        screen.print(f"{finding.level}: {place}{finding.message}", style="yellow", soft_wrap=True)
    if prepared.cost is not None and prepared.cost.amount is not None:
        cost = prepared.cost
        tokens = "" if cost.tokens is None else f" for {cost.tokens:,} tokens"
        screen.print(f"about {cost.amount:g} {cost.currency}{tokens}: {cost.basis}", soft_wrap=True)
    elif prepared.cost is not None:
        screen.print(f"price unknown: {prepared.cost.basis}", style="yellow", soft_wrap=True)


async def _estimated(manager: Any, reading: Reading, name: str | None, max_cost: float | None) -> dict[str, Any]:
    """Return one line of the table: what a provider would charge for the recipe, or why it refuses."""
    import attrs

    from luthier.jobs.making.preparing import plain_findings
    from luthier.jobs.restoring import make_provider

    ready = make_provider(reading.recipe.provider if name is None else name)
    capabilities = await ready.part.capabilities(reading.recipe.model.name_or_path)
    line: dict[str, Any] = {
        "provider": ready.name, "methods": list(capabilities.methods), "weights": list(capabilities.weights),
        "amount": None, "currency": None, "tokens": None, "basis": None, "refused": None, "findings": [],
    }  # fmt: skip
    try:
        prepared = await manager.prepare(reading, provider=name, max_cost=max_cost)
    except LuthierError as error:
        return {**line, "refused": error.line}
    place = ready.part.scope() or ready.name
    cost = {"basis": f"no price: it runs on {place}"} if prepared.cost is None else attrs.asdict(prepared.cost)
    return {**line, **cost, "findings": plain_findings(prepared.findings)}
