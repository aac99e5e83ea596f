"""The callback `wandb`: it sends every number of metrics.jsonl to a W&B run, with the recipe as config."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from luthier import LuthierError, event, get_logger
from requests.utils import get_netrc_auth

from luthier_wandb import Wandb

os.environ.setdefault(
    "WANDB_ERROR_REPORTING", "false"
)  # otherwise the client reports its own errors to W&B, even offline

try:
    from pydantic import ValidationError
    from wandb import Settings, errors, init, setup
except ImportError as error:
    raise LuthierError("dependency-missing", f"W&B's client cannot be imported: {error}", where="callback 'wandb'",
                       remedy="Run: pip install luthier-wandb wandb") from error  # fmt: skip

PLACE: Final = "callback 'wandb'"
THEN: Final = "training goes on without this tracker"
FIELDS: Final = {"project": "project", "run_name": "run_name", "entity": "entity", "tags": "run_tags",
                 "group": "run_group", "notes": "run_notes", "mode": "mode", "base_url": "base_url",
                 "finish_timeout": "finish_timeout"}  # fmt: skip

OPEN: Final[dict[str, Any]] = {}  # W&B runs of this process that have not ended, by id

log = get_logger()


class Tracker:
    """The callback that sends to one W&B run, on rank 0.

    A run that cannot be opened is an error before the first step. A later failure is logged once, and training
    continues without the tracker.
    """

    def __init__(self, options: Wandb) -> None:
        self.options = options
        self.settings = client_settings(options)
        require_key(options)
        self.wandb_id: str | None = None
        self.active: Any = None  # wandb.Run

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
    def stopped(self, reason: str) -> None:
        self._finish("stopped", f"stopped: {reason}", exit_code=0)

    @event
    def completed(self) -> None:
        self._finish("completed", "completed", exit_code=0)

    @event
    def failed(self, error: BaseException) -> None:
        self._finish("failed", f"failed: {getattr(error, 'code', type(error).__name__)}", exit_code=1)

    def state(self) -> dict[str, Any]:
        """Return the id of the W&B run, with which a resumed run continues it."""
        return {"wandb_id": self.wandb_id}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.wandb_id = state["wandb_id"]

    def _open(self, run: Any) -> None:
        if not run.is_main:
            return
        folder = self.options.dir or os.environ.get("WANDB_DIR") or str(run.folder)
        try:
            os.makedirs(folder, exist_ok=True)
            if self.wandb_id in OPEN:  # an interrupted training of this process left it open
                OPEN.pop(self.wandb_id).finish(exit_code=1)
            self.active = init(settings=self.settings, dir=folder, name=self.options.run_name or run.name,
                               id=self.wandb_id, resume="allow" if self.wandb_id else None,
                               config={**run.settings, "run_id": run.run_id})  # fmt: skip
        except Exception as error:
            remedy = "Check the key, entity, project and address, or set mode: offline."
            problem = f"no run could be opened: {said(error)}"
            raise LuthierError("part-unsupported", problem, where=PLACE, remedy=remedy) from error
        self.wandb_id = self.active.id
        OPEN[self.wandb_id] = self.active
        log.info("tracker_opened", tracker="wandb", id=self.wandb_id, mode=self.active.settings.mode,
                 url=self.active.settings.run_url or None, folder=folder)  # fmt: skip

    def _finish(self, during: str, status: str, exit_code: int) -> None:
        self._try(during, lambda active: active.summary.update({"status": status}))
        self._try(during, lambda active: active.finish(exit_code=exit_code))
        self.active = None
        OPEN.pop(self.wandb_id or "", None)

    def _try(self, during: str, act: Callable[[Any], None]) -> None:
        """Call `act` with the open run, if there is one. A failure is logged, and ends the tracker."""
        if self.active is None:
            return
        try:
            act(self.active)
        except Exception as error:
            folder, self.active = self.active.settings.sync_dir, None
            log.error("tracker_failed", tracker="wandb", during=during, error=said(error), then=THEN,
                      remedy=f"What was recorded can be sent later: wandb sync {folder}")  # fmt: skip


def client_settings(options: Wandb) -> Settings:
    """Return the client's settings for these options. Raises `recipe-out-of-range` if the client refuses one."""
    given = {FIELDS[name]: getattr(options, name) for name in FIELDS if getattr(options, name) is not None}
    try:
        return Settings(**given, finish_timeout_raises=True, reinit="create_new", console="off", silent=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = next((n for n, field in FIELDS.items() if field in first["loc"]), "option")
        raise LuthierError("recipe-out-of-range", f"W&B refuses it: {first['msg']}", where=f"{PLACE}: {name}",
                           found=given.get(FIELDS.get(name, ""))) from error  # fmt: skip
    except errors.UsageError as error:
        raise LuthierError("recipe-out-of-range", f"W&B refuses an option: {said(error)}", where=PLACE) from error


def require_key(options: Wandb) -> None:
    """Raise `recipe-missing` if the client would ask for a key at a prompt."""
    if options.mode in ("offline", "disabled") or os.environ.get("WANDB_API_KEY"):
        return
    own = setup().settings
    if (options.mode or own.mode) in ("offline", "disabled", "dryrun"):
        return
    host = options.base_url or own.base_url
    if not (own.api_key or own.identity_token_file or get_netrc_auth(host)):
        raise LuthierError("recipe-missing", f"no API key for {redacted(host)}", where=PLACE,
                           remedy="Set WANDB_API_KEY, run `wandb login`, or set mode: offline.")  # fmt: skip


def said(error: Exception) -> str:
    """Return type and text of an error, on one line."""
    return redacted(f"{type(error).__name__}: {' '.join(str(error).split())}")


def redacted(text: str) -> str:
    """Return the text without user and password in its addresses."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)
