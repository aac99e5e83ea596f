"""Files too large for one request: they are sent in parts, whose ids are stored, so that a cut costs one part."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs

from luthier.jobs.provider_error import ProviderError
from luthier.jobs.transport.file_bodies import FilePart
from luthier.jobs.transport.service_client import Call, ServiceClient
from luthier.plugins.providing.job_records import DataFile, Progress

LIFE: Final = 3000.0  # seconds for which an upload is continued; the service keeps it for an hour
KIND: Final = "text/jsonl"
# the kinds of error for an upload that the service no longer has
STALE: Final = ("invalid", "not_found", "exists", "ended")


@attrs.define(kw_only=True)
class PartUpload:
    """One upload: the service's id of it and of the parts that it has. It is stored in a note beside the job."""

    id: str
    begun: float
    size: int  # bytes of one part
    sha256: str
    parts: list[str] = attrs.field(factory=list)

    def write_note(self, note: Path) -> None:
        """Write the note in such a way that no reader sees half of it."""
        partial = note.with_suffix(".partial")
        partial.write_text(json.dumps(attrs.asdict(self)), "utf-8")
        os.replace(partial, note)


async def send_in_parts(
    client: ServiceClient, place: Callable[[str], str], file: DataFile, *, note: Path, name: str, size: int,
    progress: Progress | None,
) -> str:  # fmt: skip
    """Send a file in parts of `size` bytes and return the service's id of it.

    `place` returns a path as the service needs it; `note` is the file that records which parts have arrived.
    """
    earlier = _read_note(note, file, size, client.clock.now())
    if earlier is not None:
        try:
            return await _send_rest(client, place, file, earlier, note, progress)
        except ProviderError as error:
            if error.kind not in STALE:
                raise
    wanted = {"purpose": "fine-tune", "filename": name, "bytes": file.size, "mime_type": KIND}
    made = await client.post_json(place("/uploads"), wanted, repeatable=True)
    fresh = PartUpload(id=str(made["id"]), begun=client.clock.now(), size=size, sha256=file.sha256)
    fresh.write_note(note)
    return await _send_rest(client, place, file, fresh, note, progress)


async def _send_rest(
    client: ServiceClient, place: Callable[[str], str], file: DataFile, upload: PartUpload, note: Path,
    progress: Progress | None,
) -> str:  # fmt: skip
    """Send the parts that are missing, and complete the upload."""
    with file.path.open("rb") as stream:
        while (begin := len(upload.parts) * upload.size) < file.size:
            part = {"data": ("part", FilePart(stream, begin, upload.size), "application/octet-stream")}
            answer = await client.send_call(Call(method="POST", path=place(f"/uploads/{upload.id}/parts"), parts=part))
            upload.parts.append(str(answer.body["id"]))
            upload.write_note(note)
            if progress is not None:
                progress(min(begin + upload.size, file.size), file.size)
    done = await client.post_json(place(f"/uploads/{upload.id}/complete"), {"part_ids": upload.parts})
    note.unlink()
    return str(done["file"]["id"])


def _read_note(note: Path, file: DataFile, size: int, now: float) -> PartUpload | None:
    """Return the upload that was begun for these bytes, if the service still has it, else None."""
    try:
        values: dict[str, Any] = json.loads(note.read_text("utf-8"))
        noted = PartUpload(**values)
    except (OSError, ValueError, TypeError):
        return None
    fits = (noted.sha256, noted.size) == (file.sha256, size)
    return noted if fits and 0 <= now - noted.begun < LIFE else None
