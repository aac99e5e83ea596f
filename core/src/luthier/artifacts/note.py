"""The note beside an artifact: what it is, which parts and base it needs, how it is prompted, which run made it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from luthier.artifacts.model_card import card_facts, is_of_hub
from luthier.errors import LuthierError
from luthier.model.weights.fingerprint import of_model
from luthier.recipe.artifact_note import NOTE_FORMAT
from luthier.runs.writing.record import library_versions, read_record

if TYPE_CHECKING:
    from luthier.data.prepare import Prepared
    from luthier.model.weights.dense_files import Files


PLAIN: Final = {"prompt_completion", "text"}  # formats whose rows go through no chat template
MAKINGS: Final = ("combined", "merge", "unmerge")  # entries that say how an artifact was made of others


@attrs.frozen(kw_only=True)
class Prompting:
    """How a run's prompts were made (as plain texts, or by a chat template with this hash), and what ends answers."""

    plain: bool
    template_hash: str | None = None
    stop_tokens: tuple[int, ...] = ()
    rows: dict[str, Any] = attrs.field(factory=dict)  # facts about the rows, for the card

    @classmethod
    def of_rows(cls, prepared: Prepared) -> Prompting:
        """Return how the rows of a run became prompts."""
        plain = set(prepared.report.format.split(", ")) <= PLAIN
        report = prepared.report
        rows = {"fingerprint": prepared.train.fingerprint, "examples": report.examples, "tokens": report.tokens}
        return cls(plain=plain, template_hash=prepared.chat_template_hash, stop_tokens=prepared.stop_tokens, rows=rows)


def make_note(
    settings: dict[str, Any], run_id: str, parts: list[dict[str, Any]], prompting: Prompting, files: Files
) -> dict[str, Any]:
    """Return the note of a run's artifact.

    `settings` is the resolved recipe as plain data; `prompting` says how the run's prompts were made; `files` says how
    a dense model made of the artifact is written.
    """
    needed = {kind: settings[kind] for kind in ("model", "adapter", "quantizer")}
    return {
        "format": NOTE_FORMAT,
        "luthier": metadata.version("luthier"),
        **needed,
        "base": of_model(settings["model"]["name_or_path"]),
        "run_id": run_id,
        "seed": settings["seed"],  # decides what the adapter drew when it was attached
        "parts": parts,
        "prompts": "plain" if prompting.plain else "chat",
        "chat_template_hash": prompting.template_hash,
        "chat_template_kwargs": settings["data"]["chat_template_kwargs"],
        "stop_tokens": list(prompting.stop_tokens),
        "files": files.plain(),
        "card": card_facts(settings, prompting.rows),
    }


def derive_note(note: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a note that stays true of an artifact made from its artifact: the base, and the parts it
    needs.

    It leaves out what describes the run: its id, rows, settings and numbers.
    """
    remaining = {name: value for name, value in note.items() if name not in MAKINGS}
    return {
        **remaining,
        "format": NOTE_FORMAT,
        "luthier": metadata.version("luthier"),
        "run_id": None,
        "parts": [part for part in note.get("parts", ()) if part["kind"] in ("adapter", "quantizer")],
        "card": {"hub_model": note.get("card", {}).get("hub_model"), "versions": library_versions()},
    }


def rename_base(note: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Return the entries of a note that name the base, for another model in its place."""
    return {
        "base": of_model(base),
        "model": {**note["model"], "name_or_path": base},
        "card": {**note.get("card", {}), "hub_model": base if is_of_hub(base) else None},
    }


def of_run(folder: Path) -> dict[str, Any]:
    """Return the note that a run keeps in its record. Raises `run-not-found`."""
    record = read_record(folder)
    if record is None:
        raise LuthierError("run-not-found", "no run.json here", where=str(folder))
    return record["note"]
