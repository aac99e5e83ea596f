"""A service's files: rows are written as JSON lines, hashed and checked, in constant memory except for the hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.errors import LuthierError, show_value
from luthier.jobs.rows.row_checks import check_counts, check_row, estimate_tokens, hash_row
from luthier.jobs.rows.service_rows import completion_conversation, training_rows, validation_rows
from luthier.plugins.providing.job_records import DataFile, DataRules, Finding, ServiceRow
from luthier.recipe.schema import Data

TOLD: Final = 20  # the most errors that are listed; the rest is only counted
Encode = Callable[[ServiceRow], Mapping[str, Any]]


@attrs.define(kw_only=True)
class RowReport:
    """The findings in the files: the first errors in full, the number of all, and remarks."""

    errors: list[Finding] = attrs.field(factory=list)
    warnings: list[Finding] = attrs.field(factory=list)
    error_count: int = 0

    def add(self, finding: Finding) -> None:
        """Add a finding."""
        if finding.level != "error":
            self.warnings.append(finding)
            return
        self.error_count += 1
        if len(self.errors) < TOLD:
            self.errors.append(finding)

    def raise_errors(self) -> None:
        """Raise the first error, with the other listed ones in its text, if there is any."""
        if not self.errors:
            return
        first, *others = self.errors
        listed = "".join(f"; {f.where}: {f.message}" for f in others)
        more = self.error_count - len(self.errors)
        problem = f"{first.message} [{first.rule}]{listed}" + (f"; and {more} more" if more else "")
        raise LuthierError("data-row", problem, where=first.where, remedy="Nothing was sent. Correct the rows named.")


def write_row_files(
    data: Data, folder: Path, *, pairs: bool, seed: int, rules: DataRules, encode: Encode
) -> tuple[dict[str, DataFile], RowReport]:
    """Write `training.jsonl`, and `validation.jsonl` if the recipe has validation rows; return them and a report.

    A line that is no row ends the reading, so it is the last error.
    """
    report, seen = RowReport(), dict[Any, Any]()
    training = training_rows(data, pairs, seed)
    files = {"training": _write_file(folder / "training.jsonl", "training", training, rules, encode, report, seen)}
    has_validation = data.validation if isinstance(data.validation, list) else data.validation > 0
    if has_validation:
        path, rows = folder / "validation.jsonl", validation_rows(data, pairs, seed)
        files["validation"] = _write_file(path, "validation", rows, rules, encode, report, seen)
    return files, report


def _write_file(
    path: Path, role: str, rows: Iterator[ServiceRow], rules: DataRules, encode: Encode,
    report: RowReport, seen: dict[bytes, str],
) -> DataFile:  # fmt: skip
    """Write one file. `seen` maps the hash of each row to the role of the file in which it came first."""
    digest, size, count, tokens, repeated, shared = hashlib.sha256(), 0, 0, 0, 0, 0
    with path.open("wb") as file:
        for row in _readable_rows(rows, report):
            taken = _fitting(row, rules)
            for finding in check_row(taken, rules):
                report.add(finding)
            key = hash_row(row)
            repeated, shared = repeated + (seen.get(key) == role), shared + (seen.get(key, role) != role)
            seen.setdefault(key, role)
            count, tokens = count + 1, tokens + estimate_tokens(taken)
            if not report.error_count:
                line = (json.dumps(encode(taken), ensure_ascii=False) + "\n").encode()
                digest.update(line)
                size += len(line)
                file.write(line)
    for finding in (*check_counts(count, size, rules, str(path), validation=role == "validation"),
                    *_remarks(repeated, shared, role)):  # fmt: skip
        report.add(finding)
    return DataFile(path=path, role=role, sha256=digest.hexdigest(), size=size, rows=count, tokens=tokens)


def _readable_rows(rows: Iterator[ServiceRow], report: RowReport) -> Iterator[ServiceRow]:
    """Yield the rows up to the first one that cannot be read, which is reported."""
    try:
        yield from rows
    except LuthierError as error:
        if error.code not in ("data-row", "data-column", "data-avoided"):
            raise
        value = "" if error.found is None else f" (found {show_value(error.found)})"
        report.add(Finding(level="error", rule=error.code, message=f"{error.problem}{value}", where=error.where))


def _fitting(row: ServiceRow, rules: DataRules) -> ServiceRow:
    """Return the row; a completion as a conversation if the service takes no completions."""
    if row.form == "completion" and "completion" not in rules.forms and "conversation" in rules.forms:
        return completion_conversation(row)
    return row


def _remarks(repeated: int, shared: int, role: str) -> Iterator[Finding]:
    if repeated:
        yield Finding(level="warning", rule="repeated", message=f"{repeated} {role} rows repeat an earlier one")
    if shared:
        message = f"{shared} {role} rows are training rows too: the evaluation will look better than it is"
        yield Finding(level="warning", rule="overlap", message=message)
