"""The values that providers and the manager exchange: a job, its data, its status, its events, its artifacts."""

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
    """One row of a service's file. `form` is conversation, completion, text or preference; fields of other forms are
    empty.

    `trained` says of each message whether it is trained on. A preference row keeps its prompt in `messages`; a
    completion keeps its prompt in `prompt` and its answer in `text`.
    """

    form: str
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
    """A file that a job trains or evaluates on. It is written before the job is entered in the journal."""

    path: Path
    role: str  # training or validation
    sha256: str
    size: int  # bytes
    rows: int
    tokens: int | None = None  # tokens of one pass over the file
    exact_tokens: bool = False  # False: `tokens` is an estimate


@attrs.frozen(kw_only=True)
class JobSpec:
    """A job as the user asked for it. `settings` holds only what the user set, by its dotted name in the recipe.

    `token`, a part of the id, is short enough for names at a service. `scope` names the account or address that the job
    belongs to, never a key.
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
    """The progress of a job. A field is None if its provider does not report it."""

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
    """The losses, tokens, time and cost of a job so far. A field is None if its provider does not report it."""

    train_loss: float | None = None
    eval_loss: float | None = None
    duration: float | None = None  # seconds
    tokens: int | None = None
    cost: float | None = None
    currency: str | None = None


@attrs.frozen(kw_only=True)
class JobStatus:
    """A provider's report on one job. `raw_state` is the service's own word; `raw` is its answer, redacted."""

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
    """Something that happened to a job. `id` is the same whenever the same event is read again."""

    id: str
    at: float  # seconds since 1970
    kind: str = "log"  # log, metrics, state, checkpoint, warning
    level: str = "info"
    message: str = ""
    metrics: dict[str, float | None] = attrs.field(factory=dict)  # None: not finite


@attrs.frozen(kw_only=True)
class EventPage:
    """A page of events after a cursor, oldest first, with the cursor from which the next page is read."""

    events: list[JobEvent]
    cursor: str | None


@attrs.frozen(kw_only=True)
class JobArtifact:
    """A result of a job. The provider finds it by `locator`, which never holds a signed link."""

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
    """A result that lies on this machine: its folder, its kind, and the checksum of each file."""

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
    """The rule for a setting that a service knows: its bounds there, and a remark if it means something else."""

    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None
    whole: bool = False  # True: a whole number only
    methods: tuple[str, ...] | None = None  # None: every method
    remark: str | None = None  # shown to the user, for example that the service rescales the value


@attrs.frozen(kw_only=True)
class DataRules:
    """The demands that a service makes on a file of rows."""

    forms: tuple[str, ...] = ("conversation",)  # conversation, completion, text
    min_rows: int = 1
    max_rows: int | None = None
    max_bytes: int | None = None
    max_row_tokens: int | None = None
    tools: bool = True
    weights: bool = False  # True: a message may say weight 0
    system_first: bool = True
    reserved: tuple[str, ...] = ()  # texts that no message may contain, because the service reads them as control marks
    max_validation_rows: int | None = None


@attrs.frozen(kw_only=True)
class TokenPrice:
    """The price of training on a million tokens. `model` is a glob pattern. A field of None matches every value."""

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

    `takes` says what it trains from: `rows`, a file that the manager converts, or the `recipe` itself. `weights` lists
    what can be downloaded in the end. `poll` is the shortest and the longest polling interval in seconds.
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
    instead: Mapping[str, str] = attrs.field(factory=dict)  # a setting that is not offered -> what to write instead


@attrs.frozen(kw_only=True)
class Finding:
    """A problem or a remark about a job, found before anything is sent. The level "error" stops the submission."""

    level: str  # error, warning, note
    rule: str
    message: str
    where: str | None = None


@attrs.frozen(kw_only=True)
class CostEstimate:
    """The estimated cost of a job. `amount` is None if the price is unknown."""

    amount: float | None
    currency: str = "USD"
    tokens: int | None = None  # trained on, over all epochs
    basis: str = ""  # where the price comes from, with its date
    exact_tokens: bool = False


@attrs.frozen(kw_only=True)
class Job:
    """A job as the store knows it."""

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
        """Return the job as plain data for `--json`."""
        plain = to_plain_data(self)
        plain["status"] = None if plain["status"] is None else {k: v for k, v in plain["status"].items() if k != "raw"}
        return {"id": self.id, **plain}


def to_plain_data(value: Any) -> Any:
    """Return a record as plain data that JSON can hold."""
    return attrs.asdict(
        value, value_serializer=lambda _, __, v: str(v) if isinstance(v, (Path, Stage, JobState)) else v
    )


def from_plain_data(value: Any, record: Any, where: str) -> Any:
    """Return the record that `to_plain_data` turned into `value`. `where` names the place in errors."""
    return structure_value(value, record, where)
