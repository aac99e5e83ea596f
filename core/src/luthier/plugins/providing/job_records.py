"""The values that providers and the job manager exchange: a job, its data, status, events and artifacts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs

from luthier.plugins.providing.job_state import JobState, Stage
from luthier.plugins.structure import structure_value

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Takes = Literal["rows", "recipe"]


@attrs.frozen(kw_only=True)
class ServiceRow:
    """One row of the file that a service gets. Fields that its `form` does not use are empty.

    - conversation: `messages`, and `trained`, which is True for each message that is trained on.
    - completion: `prompt`, and `text` as its answer.
    - text: `text`.
    - preference: `messages` as the prompt, `chosen` and `rejected`.
    """

    form: str  # conversation, completion, text or preference
    where: str  # file:line
    messages: tuple[dict[str, Any], ...] = ()
    trained: tuple[bool, ...] = ()
    tools: list[dict[str, Any]] | None = None
    prompt: str = ""
    text: str = ""
    chosen: tuple[dict[str, Any], ...] = ()
    rejected: tuple[dict[str, Any], ...] = ()


@attrs.frozen(kw_only=True)
class DataFile:
    """A file that a job trains or evaluates on."""

    path: Path
    role: str  # training or validation
    sha256: str
    size: int  # bytes
    rows: int
    tokens: int | None = None  # of one epoch
    exact_tokens: bool = False  # False: an estimate


@attrs.frozen(kw_only=True)
class JobSpec:
    """A job as the user asked for it.

    `settings` holds only what the user set, by its dotted name in the recipe. `scope` names the account or address that
    the job belongs to, never a key. `token` is the random part of `id`, short enough for names at a service.
    """

    id: str
    provider: str
    options: dict[str, Any]
    scope: str
    model: str
    method: str  # the loss: sft, dpo, ...
    settings: dict[str, Any]
    folder: Path
    output_dir: Path | None
    files: dict[str, DataFile] = attrs.field(factory=dict)
    created: float = 0.0  # seconds since 1970
    max_cost: float | None = None

    @property
    def token(self) -> str:
        """Return the random part of the id."""
        return self.id.rpartition("-")[2]


@attrs.frozen(kw_only=True)
class JobProgress:
    """How far a job has come. None: the service does not say."""

    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    total_epochs: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    tokens: int | None = None
    seconds_left: float | None = None


@attrs.frozen(kw_only=True)
class JobMetrics:
    """The losses, time and cost of a job so far. None: the service does not say."""

    train_loss: float | None = None
    eval_loss: float | None = None
    duration: float | None = None  # seconds
    tokens: int | None = None
    cost: float | None = None
    currency: str | None = None


@attrs.frozen(kw_only=True)
class JobStatus:
    """The status of one job. `raw_state` is the service's own word for `state`, `raw` its answer without secrets."""

    remote_id: str
    state: JobState
    raw_state: str
    phase: str | None = None
    reason: str | None = None
    progress: JobProgress = attrs.field(factory=JobProgress)
    metrics: JobMetrics = attrs.field(factory=JobMetrics)
    result_model: str | None = None
    settings: dict[str, Any] = attrs.field(factory=dict)  # as the service resolved them, defaults included
    created: float | None = None
    finished: float | None = None
    raw: dict[str, Any] = attrs.field(factory=dict, repr=False)


@attrs.frozen(kw_only=True)
class JobEvent:
    """An event of a job. An event that is read twice has the same `id`."""

    id: str
    at: float  # seconds since 1970
    kind: str = "log"  # log, metrics, state, checkpoint, warning
    level: str = "info"
    message: str = ""
    metrics: dict[str, float | None] = attrs.field(factory=dict)  # None: not finite


@attrs.frozen(kw_only=True)
class EventPage:
    """The events after a cursor, the oldest first, and the cursor for the next reading."""

    events: list[JobEvent]
    cursor: str | None


@attrs.frozen(kw_only=True)
class JobArtifact:
    """A result of a job. `locator` lets its provider find it again; it never holds a signed link."""

    kind: str  # adapter, model, checkpoint, metrics, hosted
    name: str
    base_model: str | None = None
    format: str | None = None
    step: int | None = None
    size: int | None = None
    sha256: str | None = None
    locator: dict[str, Any] = attrs.field(factory=dict)
    downloadable: bool = True


@attrs.frozen(kw_only=True)
class TrainedArtifact:
    """A downloaded result: its folder, its kind, and the checksum of each file."""

    path: Path
    kind: str
    format: str | None
    base_model: str | None
    job_id: str
    remote_id: str
    metrics: JobMetrics
    adapter_config: dict[str, Any] | None
    files: dict[str, str]  # name -> sha256


@attrs.frozen(kw_only=True)
class SettingRule:
    """A setting of the recipe that a service accepts, with its bounds there."""

    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None
    whole: bool = False  # True: a whole number only
    methods: tuple[str, ...] | None = None  # None: every method
    remark: str | None = None  # shown to the user, for example that the service rescales the value


@attrs.frozen(kw_only=True)
class DataRules:
    """The rules of a service for a file of rows."""

    forms: tuple[str, ...] = ("conversation",)  # conversation, completion, text
    min_rows: int = 1
    max_rows: int | None = None
    max_bytes: int | None = None
    max_row_tokens: int | None = None
    tools: bool = True
    weights: bool = False  # True: a message may say weight 0
    system_first: bool = True
    reserved: tuple[str, ...] = ()  # texts that no message may contain, because the service reads them as its own marks
    max_validation_rows: int | None = None


@attrs.frozen(kw_only=True)
class TokenPrice:
    """The price of training on a million tokens. `model` is a glob pattern; `method`, `adapter` None: any."""

    model: str
    amount: float
    date: str  # of the price list, such as 2025-08-01
    method: str | None = None
    adapter: str | None = None  # lora or full
    currency: str = "USD"
    minimum: float = 0.0  # the least that one job costs


@attrs.frozen(kw_only=True)
class Capabilities:
    """The abilities of a provider for one model, known without a request.

    - `takes`: what it trains from: "rows", a file that Luthier writes for it, or "recipe", the recipe itself.
    - `weights`: what can be downloaded when the job is complete: "adapter", "model", both or nothing.
    - `poll`: the shortest and the longest interval between two requests for the status, in seconds.
    """

    takes: Takes = "rows"
    methods: tuple[str, ...] = ("sft",)
    settings: Mapping[str, SettingRule] = attrs.field(factory=dict)
    rules: DataRules = attrs.field(factory=DataRules)
    validation_file: bool = True
    weights: tuple[str, ...] = ()  # adapter, model
    events: bool = True
    poll: tuple[float, float] = (5.0, 60.0)
    prices: tuple[TokenPrice, ...] = ()
    default_epochs: float | None = None  # None: the service chooses
    known_models: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    instead: Mapping[str, str] = attrs.field(factory=dict)  # a setting that is not accepted -> what to write instead


@attrs.frozen(kw_only=True)
class Finding:
    """An error, a warning or a note about a job, found before anything is sent. An error stops the submission."""

    level: str  # error, warning, note
    rule: str
    message: str
    where: str | None = None


@attrs.frozen(kw_only=True)
class CostEstimate:
    """The estimated cost of a job. An `amount` of None means that the price is unknown."""

    amount: float | None
    currency: str = "USD"
    tokens: int | None = None  # of all epochs
    basis: str = ""  # where the price comes from, with its date
    exact_tokens: bool = False


@attrs.frozen(kw_only=True)
class Job:
    """A job with its state, as the job store keeps it."""

    spec: JobSpec
    stage: Stage
    state: JobState
    raw_state: str | None = None
    phase: str | None = None
    reason: str | None = None
    remote_id: str | None = None
    status: JobStatus | None = None
    uploads: dict[str, str] = attrs.field(factory=dict)  # role -> the service's id of the file
    cancel_requested: float | None = None
    updated: float = 0.0

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def is_final(self) -> bool:
        return self.state.is_final

    def to_dict(self) -> dict[str, Any]:
        """Return the job as plain data, for `--json`."""
        plain = to_plain_data(self)
        plain["status"] = None if plain["status"] is None else {k: v for k, v in plain["status"].items() if k != "raw"}
        return {"id": self.id, **plain}


def to_plain_data(value: Any) -> Any:
    """Return a record as data that JSON can hold."""
    return attrs.asdict(
        value, value_serializer=lambda _, __, v: str(v) if isinstance(v, (Path, Stage, JobState)) else v
    )


def from_plain_data(value: Any, record: Any, where: str) -> Any:
    """Return the record from which `to_plain_data` made `value`. Errors name `where`."""
    return structure_value(value, record, where)
