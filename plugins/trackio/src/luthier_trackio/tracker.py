"""The callback `trackio`: it sends every number of metrics.jsonl to a Trackio run, with the recipe as config."""

from __future__ import annotations

import contextlib
import contextvars
import io
import os
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from luthier import LuthierError, event, get_logger

from luthier_trackio import Trackio

try:
    import huggingface_hub
    import trackio
    from trackio import AlertLevel, utils
    from trackio.remote_client import RemoteClient
    from trackio.run import Run
    from trackio.sqlite_storage import SQLiteStorage
except ImportError as error:
    raise LuthierError("dependency-missing", f"Trackio cannot be imported: {error}", where="callback 'trackio'",
                       remedy="Run: pip install luthier-trackio trackio") from error  # fmt: skip

PLACE: Final = "callback 'trackio'"
THEN: Final = "training goes on without this tracker"
UNOPENED: Final = (
    r"trackio\.init\(\) could not (prepare|create a remote client)"  # of a warning, after which init goes on
)
LOCAL_END: Final = "* Run finished. Uploading logs to Trackio ("  # printed where nothing is uploaded
REMEDY: Final = "Check space_id, server_url, the login and TRACKIO_DIR; without space_id and server_url it is local."

log = get_logger()


class OwnRun(Run):
    """A run of the local store or of a server of one's own.

    The library's class sends a stored token to the hub to learn the user's name; this one asks the hub for nothing. It
    also keeps the first failure of the local store, of which the library only warns.
    """

    problem: str | None = None

    def _get_username(self) -> None:
        return None

    def _warn_once(self, key: str, message: str) -> None:
        if self.url is not None:  # the numbers wait in the local store, and are sent later
            super()._warn_once(key, message)
        self.problem = self.problem or (message if self.url is None else None)


class Tracker:
    """The callback that writes one Trackio run, on rank 0.

    A run that cannot be opened is an error before the first step. A later failure is logged once, and training
    continues without the tracker.
    """

    def __init__(self, options: Trackio) -> None:
        self.options = options
        self.space_id, self.server_url = utils.resolve_space_id_and_server_url(options.space_id, options.server_url)
        self.trackio_id: str | None = None
        self.active: Run | None = None
        if options.private is not None and not self.space_id:
            raise LuthierError("recipe-conflict", "no Space is named, and nothing else can be private",
                               where=f"{PLACE}: private", remedy="Add space_id, or leave out private.")  # fmt: skip
        require_project(options.project)
        require_token(self.space_id, self.server_url)

    @event
    def run_started(self, run: Any) -> None:
        self._open(run)

    @event
    def resumed(self, run: Any) -> None:
        self._open(run)

    @event
    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try("logged", lambda active: active.log(dict(metrics), step=step))

    @event
    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try("evaluated", lambda active: active.log(dict(metrics), step=step))

    @event
    def stopped(self, step: int, reason: str) -> None:
        self._try("stopped", lambda active: active.alert("stopped", reason, AlertLevel.WARN, step))
        self._finish("stopped")

    @event
    def completed(self) -> None:
        self._finish("completed")

    @event
    def failed(self, error: BaseException) -> None:
        cause = getattr(error, "code", type(error).__name__)
        self._try("failed", lambda active: active.alert("failed", cause, AlertLevel.ERROR))
        self._finish("failed")

    def state(self) -> dict[str, Any]:
        """Return the id of the Trackio run, with which a resumed run continues it."""
        return {"trackio_id": self.trackio_id}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.trackio_id = state["trackio_id"]

    def _open(self, run: Any) -> None:
        if not run.is_main:
            return
        name, config = self.options.run_name or run.name, {**run.settings, "run_id": run.run_id}
        try:
            with quiet_output():
                self.active = self._open_space(name, config) if self.space_id else self._open_own(name, config)
        except Exception as error:
            problem = f"no run could be opened: {error_text(error)}"
            raise LuthierError("part-unsupported", problem, where=PLACE, remedy=REMEDY) from error
        self.trackio_id = self.active.id
        self._say_where("tracker_opened")

    def _say_where(self, happened: str) -> None:
        """Log where the numbers lie, and the command that shows them."""
        address = self.space_id or redacted_text(self.server_url or str(utils.TRACKIO_DIR))
        log.info(happened, tracker="trackio", id=self.trackio_id, address=address,
                 show=f"trackio show --project {shlex.quote(self.options.project)}")  # fmt: skip

    def _open_own(self, name: str, config: dict[str, Any]) -> Run:
        """Open a run of the local store, or of the server, which is asked whether it is there."""
        project, group = self.options.project, self.options.group
        utils.TRACKIO_DIR.mkdir(parents=True, exist_ok=True)
        if utils.get_storage_mode() == "sqlite":
            SQLiteStorage.init_db(project)
        if not self.server_url:
            return OwnRun(None, project, None, name, self.trackio_id, group, config)
        url, token = utils.parse_trackio_server_url(self.server_url)
        token = token or os.environ["TRACKIO_WRITE_TOKEN"]
        client = RemoteClient(url, write_token=token)
        return OwnRun(url, project, client, name, self.trackio_id, group, config, server_base_url=url,
                      write_token=token)  # fmt: skip

    def _open_space(self, name: str, config: dict[str, Any]) -> Run:
        """Open a run at a Space. One that the caller of the training has open stays open.

        Raises what the library only warns of: a Space that cannot be made or reached.
        """
        options = self.options
        with warnings.catch_warnings():
            warnings.filterwarnings("error", UNOPENED)
            opened = contextvars.Context().run(lambda: trackio.init(
                options.project, name, options.group, self.space_id, config=config, private=options.private,
                embed=False, auto_log_gpu=False, auto_log_cpu=False))  # fmt: skip
        opened.id = self.trackio_id or opened.id
        return opened

    def _finish(self, during: str) -> None:
        self._try(during, lambda active: active.finish())
        if self.active is not None:
            self._say_where("tracker_closed")
        self.active = None

    def _try(self, during: str, act: Callable[[Run], None]) -> None:
        """Call `act` with the open run, if there is one. A failure is logged, and ends the tracker."""
        if self.active is None:
            return
        with quiet_output():
            act(self.active)  # raises nothing: the library turns every failure into a warning
        problem = getattr(self.active, "problem", None)
        if problem:
            failed, self.active = self.active, None
            log.error("tracker_failed", tracker="trackio", during=during, error=redacted_text(problem), then=THEN)
            with quiet_output():
                failed.finish()


def require_project(project: str) -> None:
    """Raise `recipe-out-of-range` for a name that the store gives a meaning of its own."""
    try:
        SQLiteStorage.validate_project_name(project)
    except ValueError as error:
        raise LuthierError("recipe-out-of-range", f"Trackio refuses it: {error_text(error)}", where=f"{PLACE}: project",
                           found=project, remedy="Choose another name.") from error  # fmt: skip


def require_token(space_id: str | None, server_url: str | None) -> None:
    """Raise `recipe-missing` if a Space or a server is named, and there is nothing to log in with.

    Raises `part-unsupported` if a Space is named while the hub must not be asked.
    """
    if space_id and huggingface_hub.is_offline_mode():
        raise LuthierError("part-unsupported", "HF_HUB_OFFLINE is set, and a Space is at the hub", where=PLACE,
                           found=space_id, remedy="Unset HF_HUB_OFFLINE, or leave out space_id.")  # fmt: skip
    if space_id and not huggingface_hub.get_token():
        raise LuthierError("recipe-missing", "no token for the Space", where=PLACE, found=space_id,
                           remedy="Set HF_TOKEN, run `hf auth login`, or leave out space_id.")  # fmt: skip
    if not server_url:
        return
    url, token = utils.parse_trackio_server_url(server_url)
    if not url.startswith(("http://", "https://")):
        raise LuthierError("recipe-out-of-range", "the server's address is not http or https", found=redacted_text(url),
                           where=f"{PLACE}: server_url", remedy="Write it like http://localhost:7860.")  # fmt: skip
    if not (token or os.environ.get("TRACKIO_WRITE_TOKEN")):
        raise LuthierError("recipe-missing", "no token for the server", where=PLACE, found=redacted_text(url),
                           remedy="Set TRACKIO_WRITE_TOKEN to what `trackio show` printed.")  # fmt: skip


@contextlib.contextmanager
def quiet_output() -> Iterator[None]:
    """Keep what the library prints off the screen, where the run's own lines are."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield
    for line in printed.getvalue().splitlines():
        if not line.startswith(LOCAL_END):
            log.debug("tracker_printed", tracker="trackio", text=redacted_text(line))


def error_text(error: Exception) -> str:
    """Return type and text of an error, on one line."""
    return redacted_text(f"{type(error).__name__}: {' '.join(str(error).split())}")


def redacted_text(text: str) -> str:
    """Return the text without the secrets of its addresses."""
    return re.sub(r"//[^/@\s]+@", "//***@", re.sub(r"(write_token=)[^&\s]+", r"\1***", text))
