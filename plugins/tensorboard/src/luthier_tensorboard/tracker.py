"""The callback `tensorboard`: it writes every number of metrics.jsonl as a scalar, and the recipe as a text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from luthier import LuthierError, event, get_logger

from luthier_tensorboard import TensorBoard

try:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
except ImportError as error:
    raise LuthierError("dependency-missing", f"TensorBoard cannot be imported: {error}", where="callback 'tensorboard'",
                       remedy="Run: pip install luthier-tensorboard tensorboard") from error  # fmt: skip

FLUSH_SECONDS: Final = 10  # only for TensorFlow's buffered files; otherwise each number is written at once
THEN: Final = "training goes on without this tracker"

log = get_logger()


class Tracker:
    """The callback that writes one event file for each start of a run, on rank 0.

    A folder that cannot be written is an error before the first step. A later failure is logged once, and training
    continues without the tracker.
    """

    def __init__(self, options: TensorBoard) -> None:
        self.options = options
        self.writer: EventFileWriter | None = None

    @event
    def run_started(self, run: Any) -> None:
        self._open(run, first=0)
        text = json.dumps(run.settings, indent=2, default=str)
        self._add("run_started", 0, lambda: [text_value("recipe", f"```json\n{text}\n```")])

    @event
    def resumed(self, run: Any, step: int) -> None:
        self._open(run, first=step + 1)

    @event
    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add("logged", step, lambda: scalar_values(metrics))

    @event
    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add("evaluated", step, lambda: scalar_values(metrics))

    @event
    def saved(self) -> None:
        self._try("saved", lambda writer: writer.flush())  # the event file is then as complete as the checkpoint

    @event
    def stopped(self) -> None:
        self._close("stopped")

    @event
    def completed(self) -> None:
        self._close("completed")

    @event
    def failed(self) -> None:
        self._close("failed")

    def _open(self, run: Any, first: int) -> None:
        """Open a new event file.

        Its first entry makes TensorBoard drop the steps from `first` on, which an earlier process wrote after its last
        checkpoint.
        """
        if not run.is_main:
            return
        folder = self.options.log_dir or str(run.folder / "tensorboard")
        try:
            self.writer = EventFileWriter(folder, flush_secs=FLUSH_SECONDS)
        except Exception as error:  # gfile raises the errors of its file system
            raise LuthierError("part-unsupported", f"cannot write event files: {error}", where="callback 'tensorboard'",
                               found=folder, remedy="Name another log_dir.") from error  # fmt: skip
        start = entry(first, session_log=SessionLog(status=SessionLog.START))
        self._try("started", lambda writer: writer.add_event(start))
        log.info("tracker_opened", tracker="tensorboard", folder=folder)

    def _add(self, during: str, step: int, values: Callable[[], list[Summary.Value]]) -> None:
        self._try(during, lambda writer: writer.add_event(entry(step, summary=Summary(value=values()))))

    def _close(self, during: str) -> None:
        self._try(during, lambda writer: writer.flush())  # close() alone hides errors of the writing thread
        self._try(during, lambda writer: writer.close())
        self.writer = None

    def _try(self, during: str, act: Callable[[Any], None]) -> None:
        """Call `act` with the open file, if there is one. A failure is logged, and ends the tracker."""
        if self.writer is None:
            return
        try:
            act(self.writer)
        except Exception as error:
            self.writer = None
            cause = f"{type(error).__name__}: {error}"
            log.error("tracker_failed", tracker="tensorboard", during=during, error=cause, then=THEN)


def entry(step: int, **what: Any) -> Event:
    """Return a record of an event file with the current time."""
    return Event(wall_time=time.time(), step=step, **what)


def scalar_values(metrics: Mapping[str, float]) -> list[Summary.Value]:
    """Return a float32 value for each metric, under its name."""
    return [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]


def text_value(tag: str, text: str) -> Summary.Value:
    """Return Markdown for TensorBoard's text page."""
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
    return Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
