"""The shared base of train, plan and inspect: a recipe from a file, flags and `--set`, and the help of its options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from luthier.cli.completion.commands import complete_setting
from luthier.cli.screen.answers import make_console, print_line
from luthier.cli.screen.flags import is_first_speaker

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.plugins.options import Described
    from luthier.recipe import Reading, Recipe

# Click would take the word after an unknown flag for the recipe, so the recipe is found in the remaining words.
FREE: Final = {"ignore_unknown_options": True, "allow_extra_args": True}
Help = Annotated[
    bool, typer.Option("--help", help="Show this; behind `--adapter NAME` or the like, that part's options.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="Set one option; may be repeated.", autocompletion=complete_setting),
]

GROUPS: Final[dict[str, str]] = {
    "Learning rate and length": "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio "
    "layerwise_lr_decay lr_multipliers num_train_epochs max_steps max_tokens training_mode",
    "Batches": "global_batch_size max_tokens_per_device per_device_train_batch_size gradient_accumulation_steps "
    "memory_check oom_recovery packing max_grad_norm router_aux_loss_coef",
    "Precision and speed": "precision pure_bf16_update torch_compile kernels gradient_checkpointing num_threads "
    "distributed on_nonfinite gradient_flow_steps",
    "Evaluation and checkpoints": "eval_steps eval_on_start metrics max_eval_answers max_eval_batches save_strategy "
    "save_steps save_samples save_final async_save save_total_limit metric_for_best_model greater_is_better "
    "load_best_model_at_end logging_steps",
    "Other models": "adapter_from reference reference_cache teacher teacher_cache",
    "The run": "output_dir run_name merge save_dtype max_shard_size seed device",
}

PARTS: Final = {kind: kind for kind in ("adapter", "loss", "optimizer", "quantizer", "provider", "trainer")} | {
    "callbacks": "callback",
    "penalties": "penalty",
}


def read_recipe(context: typer.Context, sets: Sequence[str] | None) -> Recipe:
    """Return the recipe that a command line means, and print its notes on standard error, once."""
    return read_reading(context, sets).recipe


def read_reading(context: typer.Context, sets: Sequence[str] | None) -> Reading[Recipe]:
    """Return what `read_recipe` does, together with what was written of it."""
    from luthier.recipe import load_recipe, parse_flags, parse_sets

    path, flags = split_words(context.args)
    reading = load_recipe(path, [*parse_flags(flags, own_flags(context)), *parse_sets(sets or ())])
    for note in reading.notes if is_first_speaker() else ():
        if context.params.get("log_format") == "json":
            print_line("info", "recipe", note=note)
        else:
            make_console(stderr=True).print(f"note: {note}", style="yellow", soft_wrap=True)
    return reading


def own_flags(context: typer.Context) -> list[str]:
    """Return the flags of the running command itself, such as `--json`."""
    return [flag for parameter in context.command.params for flag in parameter.opts if flag.startswith("--")]


def split_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the recipe's path, and the flags. The path comes first, or last if it has a recipe's suffix."""
    from luthier.recipe.reading.recipe_files import READERS

    if words and not words[0].startswith("-"):
        return Path(words[0]), list(words[1:])
    if len(words) > 1 and Path(words[-1]).suffix in READERS and not _awaits_value(words[-2]):
        return Path(words[-1]), list(words[:-1])
    return None, list(words)


def show_help(context: typer.Context, usage: str) -> None:
    """Print the options of the parts that the flags name; without any, the command's own and the settings in groups."""
    screen = make_console()
    named = list(_named_parts(split_words(context.args)[1]))
    if not named:
        _draw_settings(screen, context, usage)
    for kind, name, prefix in named:
        _draw_named(screen, kind, name, prefix)
    raise typer.Exit


def _awaits_value(word: str) -> bool:
    return word.startswith("--") and "=" not in word


def _named_parts(flags: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield kind, name and options' prefix of each part that the flags name, such as `--adapter lora`."""
    from luthier.plugins.structure import bare_value
    from luthier.recipe import parse_flags
    from luthier.recipe.parts import FIELDS

    for override in parse_flags(flags):
        value = bare_value(override.value)
        if override.steps == ("callbacks",):
            entries = value if isinstance(value, list) else [value]
            yield from (("callback", _name(entry), f"callbacks.{i}.") for i, entry in enumerate(entries))
        elif override.steps[0] in FIELDS and override.steps[1:] in ((), ("name",)):
            yield override.steps[0], _name(value), f"{override.steps[0]}."


def _name(value: Any) -> str:
    """Return the name in a part's value: the value itself, or that of `{name: ..., options}`."""
    return str(value.get("name")) if isinstance(value, dict) else str(value)


def _draw_named(screen: Console, kind: str, name: str, prefix: str) -> None:
    from luthier.cli.plugins import draw_part
    from luthier.plugins.options import describe_options
    from luthier.plugins.registry import installed_plugins
    from luthier.recipe.reading.aliases import QUANTIZED

    registry = installed_plugins()
    offer = registry.get(kind, QUANTIZED.get(name, name) if kind == "adapter" else name)
    if offer.record.name != name:
        screen.print(f"{kind} {name} means {offer.record.name} with quantizer nf4.")
    draw_part(screen, offer, describe_options(registry.options(offer)), flags=prefix)


def _draw_settings(screen: Console, context: typer.Context, usage: str) -> None:
    from luthier.cli.screen.options_table import options_table
    from luthier.cli.screen.tables import draw_section, plain_table
    from luthier.plugins.options import describe_options
    from luthier.recipe import Data, Model, Recipe, Source

    screen.print(usage, end="\n\n")
    table = plain_table("", "", show_header=False)
    for parameter in context.command.params:
        record = parameter.get_help_record(context)
        if record:
            table.add_row(*record)
    draw_section(screen, "This command", table)
    draw_section(screen, "Model: --model NAME, and", options_table(describe_options(Model)[1:], "model.", flags=True))
    draw_section(screen, "Data: --data PATH, and", options_table(describe_options(Data)[1:], "data.", flags=True))
    draw_section(
        screen, "Each source, where data.train is a list of {path: ..., ...}", options_table(describe_options(Source))
    )
    draw_section(screen, "Parts: their options are shown by --help behind a name, and set as --adapter.r 8", _parts())
    for title, options in grouped(describe_options(Recipe)).items():
        draw_section(screen, title, options_table(options, flags=True))


def grouped(described: Sequence[Described]) -> dict[str, list[Described]]:
    """Return the run's flat settings under the titles of their groups. A setting without group is under `Further`."""
    settings = {option.name: option for option in described}
    groups = {title: [settings[name] for name in names.split()] for title, names in GROUPS.items()}
    apart = {"model", "data", *PARTS, *(name for names in GROUPS.values() for name in names.split())}
    further = [option for name, option in settings.items() if name not in apart]
    return groups | ({"Further": further} if further else {})


def _parts() -> Any:
    """Return a row for each field of parts, with the installed names; of a family such as `peft.` only the number."""
    from rich.text import Text

    from luthier.cli.screen.tables import plain_table
    from luthier.plugins.registry import installed_plugins

    table = plain_table("", "", show_header=False)
    for field, kind in PARTS.items():
        names = [offer.record.name for offer in installed_plugins().offers(kind)]
        families = Counter(name.partition(".")[0] for name in names if "." in name)
        single = [name for name in names if "." not in name]
        shown = [*single, *(f"{family}.* ({count})" for family, count in families.items())]
        table.add_row(Text(f"--{field}", style="bold"), ", ".join(shown))
    return table
