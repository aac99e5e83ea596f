"""Remarks for the user on a finished preparation: shares dropped or cut, and what the template did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from luthier.data.examples import TokenDataset
from luthier.data.formats.read_rows import ReadRows, Talks
from luthier.data.report import Report
from luthier.data.tokenise.chat_template import ChatTemplate

TOLD: Final = 20  # names of columns that one remark lists
CHANGES: Final = {
    "truncated": "were cut to max_length",
    "split": "were longer than max_length and were split",
    "parted": "became one example for each answer, because the chat template rewrites earlier messages",
    "weighted": "became one example for each weight that their answers have",
    "last_answer": "are supervised in their last answer only, because the chat template rewrites the earlier ones",
    "unrendered": "hold what the chat template does not write",
    "trailing": "end with messages after the last supervised answer, which no example has",
    "undecodable": "hold supervised text that their tokens do not reproduce, such as a character without token",
    "special_tokens": "hold special tokens in their messages' text, where they act as such",
}


def warnings_of(report: Report, read: ReadRows, template: ChatTemplate | None) -> list[str]:
    """Return sentences with counts and percentages, the most important first."""
    remarks = []
    if report.dropped:
        remarks.append(f"{_share(report.dropped, report.rows)} were dropped: {_listed(report.drops)}")
    for source in report.sources:
        if source["epoch_rows"] > source["rows"] * source["repeat"]:
            often = f"{source['epoch_rows'] / max(source['rows'], 1):.1f}"
            remarks.append(
                f"the {source['rows']} rows of {source['path']} come {often} times in an epoch, for their share"
            )
    if report.bad_rows:
        remarks.append(f"the first bad rows: {'; '.join(report.bad_rows)}")
    remarks += [f"{_share(n, report.rows)} {CHANGES[what]}{_roles(what, report)}" for what, n in report.changes.items()]
    if template is not None:
        remarks += _of_template(read.talks, template)
    if read.absent:
        remarks.append(f"columns that are ignored and that no row has: {_named(read.absent)}")
    if read.unread:
        remarks.append(f"nothing reads these columns: {_named(read.unread)}")
    return remarks


def remark_repeated(train: TokenDataset, validation: TokenDataset) -> list[str]:
    """Return a remark if validation examples are training examples too, because their loss then says little."""
    known = {hash(example.input_ids.tobytes()) for example in train}
    again = sum(hash(example.input_ids.tobytes()) in known for example in validation)
    return [f"{again} of {len(validation)} validation examples are training examples too"] if again else []


def _roles(what: str, report: Report) -> str:
    return f": {_listed(report.unrendered)}" if what == "unrendered" else ""


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _named(names: Sequence[str]) -> str:
    more = f", and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return ", ".join(names[:TOLD]) + more


def _share(count: int, rows: int) -> str:
    return f"{count} of {rows} rows ({100 * count / max(rows, 1):.1f} %)"


def _of_template(talks: Talks, template: ChatTemplate) -> list[str]:
    if not talks.count:
        return []
    remarks = []
    if unknown := sorted(name for name in {*template.settings, *talks.settings} if name not in template.text):
        remarks.append(f"the chat template does not read these of chat_template_kwargs: {', '.join(unknown)}")
    if not template.closes:
        remarks.append(f"the chat template ends answers with no special token: {template.stop} is put after each")
    if "strftime_now" in template.text:
        remarks.append("the chat template writes today's date: on another day the same rows give other tokens")
    if talks.bare and (system := template.own_system()):
        remarks.append(
            f"the chat template puts its own system prompt {system!r} before {_share(talks.bare, talks.count)}"
        )
    return remarks
