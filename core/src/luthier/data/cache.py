"""The cache: token examples on disk, found again by the hash of everything that made them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import numpy as np

from luthier.data.examples import TokenDataset
from luthier.data.read.content_hash import SIZE, code_hash, file_hash, tokenizer_hash
from luthier.data.report import Report
from luthier.data.stream.source_rows import Supply
from luthier.data.tokenise.chat_template import ChatTemplate
from luthier.disk import cache_folder
from luthier.logs import get_logger
from luthier.recipe.schema import Data

log = get_logger()
SMALLEST: Final = 1 << 18  # bytes of rows below which making them again is as fast
LIMIT: Final = 20 << 30  # bytes of all entries; beyond it, those not used for the longest time are removed
ENTRY: Final = "entry.json"
ARRAYS: Final = ("input_ids", "labels", "starts", "weights", "documents", "index")
WITHOUT: Final = ("train", "validation", "num_proc", "cache", "streaming", "shuffle_buffer", "chat_template")

Sets = tuple[TokenDataset, TokenDataset | None, Report]


@attrs.frozen
class Entry:
    """One entry of the cache."""

    folder: Path

    @classmethod
    def of(
        cls,
        data: Data,
        supplies: Mapping[str, Sequence[Supply]],
        tokenizer: Any,
        template: ChatTemplate | None,
        others: Mapping[str, object],
    ) -> Entry | None:
        """Return the entry for these ingredients; None if caching does not pay, or the rows cannot be hashed."""
        every = [supply for given in supplies.values() for supply in given]
        if sum(supply.size for supply in every) < SMALLEST or any(supply.content is None for supply in every):
            return None
        try:
            tokens = tokenizer_hash(tokenizer)
        except Exception as error:  # a tokenizer that cannot be saved, or a full disk: each has its own error class
            log.warning("examples are not kept in the cache", because=f"the tokenizer has no files: {error}")
            return None
        text = template.text if template is not None else ""
        key = {
            "code": code_hash(),
            "tokenizer": tokens,
            "template": text,
            "day": time.strftime("%Y-%m-%d") if "strftime_now" in text else "",
            "options": attrs.asdict(data, filter=lambda field, _: field.name not in WITHOUT),
            "rows": {name: [supply.identity for supply in given] for name, given in supplies.items()},
            **others,
        }
        name = hashlib.blake2b(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:SIZE]
        return cls(cache_folder() / "examples" / name)

    def read(self) -> Sets | None:
        """Return the stored sets, arrays mapped from disk; None if there are none or, with a warning, if damaged."""
        try:
            entry = json.loads((self.folder / ENTRY).read_text("utf-8"))
        except OSError:
            return None
        except ValueError:
            entry = {}
        try:
            sets = self._verified(entry)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("cached examples are damaged and made again", folder=str(self.folder), error=str(error))
            return None
        with contextlib.suppress(OSError):
            os.utime(self.folder / ENTRY)
        log.info("examples taken from the cache", folder=str(self.folder), made=entry["made"])
        return sets

    def write(self, sets: Sets) -> None:
        """Store the sets: written aside, then renamed.

        A cache that cannot be written gives a warning and does no harm.
        """
        aside = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
        train, validation, report = sets
        try:
            aside.mkdir(parents=True)
            named = {"train": train} if validation is None else {"train": train, "validation": validation}
            for name, dataset in named.items():
                _save(dataset, aside, name)
            files = {path.name: file_hash(path) for path in sorted(aside.iterdir())}
            made = time.strftime("%Y-%m-%d %H:%M:%S")
            entry = {"made": made, "sets": list(named), "report": report.to_dict(), "files": files}
            (aside / ENTRY).write_text(json.dumps(entry), "utf-8")
            shutil.rmtree(self.folder, ignore_errors=True)  # removes a damaged entry
            aside.rename(self.folder)
        except OSError as error:
            if not self.folder.exists():  # otherwise another process was faster
                log.warning("examples are not kept in the cache", folder=str(self.folder), error=str(error))
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            prune(self.folder.parent, LIMIT, but=self.folder)

    def _verified(self, entry: dict[str, Any]) -> Sets:
        for name, expected in entry["files"].items():
            if file_hash(self.folder / name) != expected:
                raise ValueError(f"{name} is not what was written")
        sets = {name: _load(self.folder, name) for name in entry["sets"]}
        return sets["train"], sets.get("validation"), Report.from_dict(entry["report"])


def prune(folder: Path, limit: int, but: Path) -> None:
    """Remove the entries not used for the longest time, until the rest takes at most `limit` bytes."""
    entries = sorted(folder.glob(f"*/{ENTRY}"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for entry in entries:
        total += sum(path.stat().st_size for path in entry.parent.iterdir())
        if total > limit and entry.parent != but:
            shutil.rmtree(entry.parent, ignore_errors=True)


def _save(dataset: TokenDataset, folder: Path, name: str) -> None:
    columns = {f"column{number}": values for number, values in enumerate(dataset.columns.values())}
    for field, array in {**{field: getattr(dataset, field) for field in ARRAYS}, **columns}.items():
        if array is not None:
            np.save(folder / f"{name}.{field}.npy", array, allow_pickle=False)
    text = {"where": dataset.where, "names": dataset.names, "columns": list(dataset.columns)}
    (folder / f"{name}.text.json").write_text(json.dumps(text), "utf-8")


def _load(folder: Path, name: str) -> TokenDataset:
    text = json.loads((folder / f"{name}.text.json").read_text("utf-8"))
    columns = {column: _mapped(folder, f"{name}.column{number}") for number, column in enumerate(text["columns"])}
    arrays = {field: _mapped(folder, f"{name}.{field}") for field in ARRAYS}
    return TokenDataset(**arrays, where=tuple(text["where"]), names=tuple(text["names"]), columns=columns)


def _mapped(folder: Path, stem: str) -> Any:
    """Return an array mapped from disk; None if there is none."""
    path = folder / f"{stem}.npy"
    return np.load(path, mmap_mode="r", allow_pickle=False) if path.exists() else None
