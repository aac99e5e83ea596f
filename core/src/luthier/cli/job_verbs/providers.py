"""`luthier providers`: the providers, what each offers, and whether it can be reached."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.completion.commands import complete_provider
from luthier.cli.screen.answers import Answer
from luthier.cli.screen.flags import Json
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from rich.table import Table

    from luthier.plugins.options import Described
    from luthier.plugins.providing.job_records import Capabilities

Name = Annotated[str, typer.Argument(metavar="PROVIDER", help="The provider's name.", autocompletion=complete_provider)]
Given = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="An option of the provider; give it again for others."),
]
ModelName = Annotated[str, typer.Option(help="The base model that is asked about.")]

app = typer.Typer(help="List the providers; show, check or verify one.")


@app.callback(invoke_without_command=True)
def providers(context: typer.Context, json: Json = False) -> Any:
    """List the installed providers."""
    if context.invoked_subcommand is not None:
        return None
    from luthier.plugins.registry import installed_plugins

    rows = [
        {"name": offer.record.name, "summary": offer.record.summary, "distribution": offer.source.distribution,
         "version": offer.source.version}
        for offer in installed_plugins().offers("provider")
    ]  # fmt: skip
    return Answer(document={"providers": rows}, view=lambda screen: _draw_list(screen, rows))


@app.command()
def show(name: Name, *, model: ModelName = "", option: Given = None, json: Json = False) -> Any:
    """Show a provider's options, methods, bounds, models, prices."""
    from luthier.cli.screen.options_table import to_dict
    from luthier.jobs.restoring import make_provider
    from luthier.jobs.sync_twins import run_plainly
    from luthier.plugins.options import describe_options
    from luthier.plugins.providing.job_records import to_plain_data
    from luthier.plugins.registry import installed_plugins

    ready = make_provider(_named_provider(name, option))
    capabilities = run_plainly(ready.part.capabilities(model))
    plugins = installed_plugins()
    described = describe_options(plugins.options(plugins.get("provider", ready.name)))
    document = {
        "name": ready.name,
        "scope": ready.part.scope(),
        "options": ready.options,
        "known_options": [to_dict(option) for option in described],
        **to_plain_data(capabilities),
    }
    return Answer(
        document=document,
        view=lambda screen: _draw_offer(screen, ready.name, ready.part.scope(), capabilities, described),
    )


@app.command()
def check(name: Name, *, option: Given = None, json: Json = False) -> Any:
    """Ask a provider, without cost, if it accepts the key."""
    from luthier.cli.screen.tables import pairs_table
    from luthier.jobs.restoring import make_provider
    from luthier.jobs.sync_twins import run_plainly

    async def ask() -> dict[str, Any]:
        async with AsyncExitStack() as stack:
            part = make_provider(_named_provider(name, option)).part
            stack.push_async_callback(part.close)
            return dict(await part.check())

    answers = run_plainly(ask())
    return Answer(document={"provider": name, "reached": True, **answers}, view=lambda screen: screen.print(pairs_table(
        {"provider": name, "reached": "yes", **answers})))  # fmt: skip


@app.command()
def verify(
    name: Name,
    *,
    model: Annotated[str, typer.Option(help="A base model that the account may tune.")],
    max_cost: Annotated[float, typer.Option(help="At most so much; a job whose price is unknown is refused.")] = 1.0,
    any_cost: Annotated[bool, typer.Option("--any-cost", help="Continue even if the price is unknown.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The transcript.")] = Path("verified.json"),
    option: Given = None,
    json: Json = False,
) -> Any:
    """Verify a provider with a tiny job, and write a transcript.

    Only this proves a provider against its live service. The job's cost until it is cancelled is charged.
    """
    from luthier.cli.screen.tables import pairs_table
    from luthier.jobs.live_check import verify_provider
    from luthier.jobs.sync_twins import run_plainly

    answers = run_plainly(verify_provider(_named_provider(name, option), model, None if any_cost else max_cost, output))
    rows = {"provider": name, "verified": answers["date"], "transcript": str(output), "state": answers["state"]}
    return Answer(document=answers, view=lambda screen: screen.print(pairs_table(rows)))


def _named_provider(name: str, given: list[str] | None) -> dict[str, str]:
    """Return the provider and its options as a recipe writes them."""
    wrong = next((word for word in given or () if "=" not in word), None)
    if wrong is not None:
        raise LuthierError("recipe-syntax", "an option must be written NAME=VALUE", where="--option", found=wrong)
    return {"name": name, **dict(word.split("=", 1) for word in given or ())}


def _draw_list(screen: Any, providers: list[dict[str, Any]]) -> None:
    from luthier.cli.screen.tables import plain_table

    table = plain_table("name", "distribution", "summary")
    for line in providers:
        table.add_row(line["name"], f"{line['distribution']} {line['version']}", line["summary"])
    screen.print(table)


def _draw_offer(screen: Any, name: str, scope: str, offer: Capabilities, described: Sequence[Described]) -> None:
    from luthier.cli.screen.options_table import options_table
    from luthier.cli.screen.tables import draw_section, pairs_table

    rows = {
        "address": scope or None,
        "methods": "every loss" if offer.takes == "recipe" else ", ".join(offer.methods),
        "trains from": "the recipe itself" if offer.takes == "recipe" else f"rows: {', '.join(offer.rules.forms)}",
        "weights": ", ".join(offer.weights) or "hosted only: they cannot be downloaded",
        "models": ", ".join(offer.known_models) or None,
    }
    draw_section(screen, name, pairs_table(rows))
    draw_section(screen, "Options", options_table(described))
    for notice in offer.notices:
        screen.print(f"notice: {notice}\n", style="yellow", soft_wrap=True)
    if offer.settings:
        draw_section(screen, "Settings that are sent", _settings_table(offer))
    if offer.prices:
        draw_section(screen, "Prices", _prices_table(offer))


def _settings_table(offer: Capabilities) -> Table:
    from luthier.cli.screen.tables import plain_table

    table = plain_table("setting", "bounds", "remark")
    for setting, rule in offer.settings.items():
        low = f"≥ {rule.low:g}" if rule.low is not None else ""
        high = f"≤ {rule.high:g}" if rule.high is not None else ""
        choices = ", ".join(map(str, rule.choices or ()))
        table.add_row(setting, " ".join(filter(None, (low, high, choices))), rule.remark or "")
    return table


def _prices_table(offer: Capabilities) -> Table:
    from luthier.cli.screen.tables import plain_table

    table = plain_table("model", "method", "adapter", ">for a million tokens", "list of")
    for price in offer.prices:
        amount = f"{price.amount:g} {price.currency}"
        table.add_row(price.model, price.method or "any", price.adapter or "any", amount, price.date)
    return table
