"""The check of a provider against its live service. Only a person with an account can run it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from luthier.errors import unwritable_path
from luthier.jobs.manager import Manager
from luthier.jobs.secret import redact_value
from luthier.plugins.providing.job_records import to_plain_data

ROWS: Final = 12  # the strictest service asks for ten rows
PATIENCE: Final = 900.0  # seconds within which a cancelled job must end


async def verify_provider(
    provider: Mapping[str, str], model: str, max_cost: float | None, output: Path
) -> dict[str, Any]:
    """Submit a tiny job, read its status, cancel it, write what happened to `output`, and return the transcript."""
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": str(2 * i)} for i in range(ROWS)]
    with tempfile.TemporaryDirectory(prefix="luthier-verify-") as folder:
        manager = Manager(folder)
        try:
            recipe = {"model": model, "num_train_epochs": 1.0, "provider": dict(provider), "adapter": "lora"}
            job = await manager.submit(recipe, data=rows, max_cost=max_cost)
            looked = await manager.status(job.id)
            await manager.cancel(job.id)
            ended = await manager.wait(job.id, timeout=PATIENCE)
            steps = manager.store.journal(job.id)
            events = await manager.events(job.id, refresh=False)
        finally:
            manager.close()
    answers = {
        "provider": provider["name"],
        "model": model,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "scope": job.spec.scope,
        "states": [job.raw_state, looked.raw_state, ended.raw_state],
        "state": str(ended.state),
        "journal": steps,
        "events": [to_plain_data(event) for event in events],
    }
    return _write_transcript(answers, output)


def _write_transcript(record: dict[str, Any], output: Path) -> dict[str, Any]:
    transcript = redact_value(json.loads(json.dumps(record, default=str)))
    try:
        output.write_text(json.dumps(transcript, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise unwritable_path(output, error) from None
    return transcript
