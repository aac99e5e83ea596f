"""Plain twins of the manager's async methods, for scripts and notebooks."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from luthier.plugins.providing.job_records import Job, JobEvent, JobMetrics, JobProgress, TrainedArtifact

Given = TypeVar("Given")


class SyncTwins:
    """Plain versions of the async methods. Each runs to its end before it returns, also inside a running event loop."""

    def submit_sync(self, recipe: Any = None, **given: Any) -> Job:
        """Run `submit` to its end."""
        return run_plainly(self.submit(recipe, **given))  # type: ignore[attr-defined]

    def status_sync(self, name: str) -> Job:
        """Run `status` to its end."""
        return run_plainly(self.status(name))  # type: ignore[attr-defined]

    def progress_sync(self, name: str) -> JobProgress:
        """Run `progress` to its end."""
        return run_plainly(self.progress(name))  # type: ignore[attr-defined]

    def metrics_sync(self, name: str) -> JobMetrics:
        """Run `metrics` to its end."""
        return run_plainly(self.metrics(name))  # type: ignore[attr-defined]

    def wait_sync(self, name: str, **given: Any) -> Job:
        """Run `wait` to its end."""
        return run_plainly(self.wait(name, **given))  # type: ignore[attr-defined]

    def events_sync(self, name: str, **given: Any) -> list[JobEvent]:
        """Run `events` to its end."""
        return run_plainly(self.events(name, **given))  # type: ignore[attr-defined]

    def cancel_sync(self, name: str) -> Job:
        """Run `cancel` to its end."""
        return run_plainly(self.cancel(name))  # type: ignore[attr-defined]

    def list_sync(self, **given: Any) -> list[Job]:
        """Run `list` to its end."""
        return run_plainly(self.list(**given))  # type: ignore[attr-defined]

    def download_sync(self, name: str, folder: Any = None, **given: Any) -> TrainedArtifact:
        """Run `download` to its end."""
        return run_plainly(self.download(name, folder, **given))  # type: ignore[attr-defined]

    def attach_sync(self, name: str, **given: Any) -> Job:
        """Run `attach` to its end."""
        return run_plainly(self.attach(name, **given))  # type: ignore[attr-defined]


def run_plainly(work: Coroutine[Any, Any, Given]) -> Given:
    """Run a coroutine to its end and return its result, in a thread of its own if an event loop already runs here."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    outcome: list[Given] = []
    failure: list[BaseException] = []
    context = contextvars.copy_context()

    def act() -> None:
        try:
            outcome.append(context.run(asyncio.run, work))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=act, name="luthier-jobs")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
