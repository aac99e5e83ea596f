"""`luthier chat`: a conversation with a model in the terminal, or line by line through a pipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from luthier.cli.completion.commands import complete_model
from luthier.cli.models import Base
from luthier.cli.screen.answers import Turns
from luthier.cli.screen.early_checks import locate_model
from luthier.cli.screen.flags import Best, LogFile, LogFormat, LogLevel, Step, start_api

Model = Annotated[
    str,
    typer.Argument(
        help="A run (folder, name or id), a checkpoint's folder, an adapter's, a model's, or a hub name.",
        autocompletion=complete_model,
    ),
]
System = Annotated[str | None, typer.Option(help="A system message before the conversation.")]
Compare = Annotated[bool, typer.Option("--compare", help="Let the base model answer too, side by side.")]
NewTokens = Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.", min=0.0)]
TopP = Annotated[float, typer.Option(help="Sample from this share of the probability.", min=0.0, max=1.0)]
Seed = Annotated[int, typer.Option(help="The seed of sampling; each turn takes the next.", min=0)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON document for each turn, on a line.")]


def chat(
    model: Model, *, base: Base = None, system: System = None, compare: Compare = False,
    max_new_tokens: NewTokens = 512, temperature: Temperature = 0.0, top_p: TopP = 1.0, seed: Seed = 0,
    device: Device = "auto", step: Step = None, best: Best = False, json: JsonLines = False,
    log_level: LogLevel = "warning", log_format: LogFormat = "console", log_file: LogFile = None,
) -> Any:  # fmt: skip
    """Talk with a run, a checkpoint or a model. /help lists the commands."""

    def hold(tell: Callable[[Mapping[str, Any]], None] | None) -> int:
        path = locate_model(model)
        start_api(log_level, log_format, log_file)
        from luthier.cli.screen.chat.session import ChatSession
        from luthier.model.generation.generate import Sampling
        from luthier.training.trained.open_chat import open_chat, open_chats

        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        if compare:
            talks = open_chats(path, base=base, system=system, device=device, step=step, best=best)
        else:
            talks = {"tuned": open_chat(path, base=base, system=system, device=device, step=step, best=best)}
        plain = "" if talks["tuned"].is_chat else "; each message is continued by itself, as plain text"
        title = f"{path}{plain}; /help lists the commands"
        return ChatSession(talks=talks, sampling=sampling, title=title, tell=tell).hold()

    return Turns(work=hold)
