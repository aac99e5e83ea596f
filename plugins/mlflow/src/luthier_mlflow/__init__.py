"""What luthier-mlflow offers: the callback `mlflow`, described without importing the client."""

from __future__ import annotations

from urllib.parse import urlsplit

import attrs
from luthier import CallbackRecord, LuthierError, hookimpl, option

__all__ = ["Mlflow", "luthier_callbacks"]


@attrs.frozen(kw_only=True)
class Mlflow:
    """Options of the callback `mlflow`, under MLflow's names.

    Credentials are never options: the client reads them from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or
    MLFLOW_TRACKING_TOKEN.
    """

    tracking_uri: str | None = option(
        None, help="A server (http, https, databricks) or a database (sqlite:///PATH); none: MLFLOW_TRACKING_URI, else "
                   "mlflow.db in the run's folder.")  # fmt: skip
    experiment_name: str | None = option(
        None, help="The experiment, created if it does not exist; none: MLFLOW_EXPERIMENT_NAME, else `Default`."
    )
    run_name: str | None = option(None, help="The run's name in MLflow; none: the run's own.")
    tags: dict[str, str] = option(factory=dict, help="Tags of the run, such as {team: search}.")

    def __attrs_post_init__(self) -> None:
        if self.tracking_uri and "@" in urlsplit(self.tracking_uri).netloc:
            raise LuthierError("recipe-conflict", "an address must not contain a secret", where="Mlflow.tracking_uri",
                               remedy="Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole of "
                                      "MLFLOW_TRACKING_URI, in the environment.")  # fmt: skip


@hookimpl
def luthier_callbacks() -> list[CallbackRecord]:
    return [
        CallbackRecord(
            name="mlflow",
            summary="The run's numbers in MLflow: a tracking server or a local SQLite store.",
            options=Mlflow,
            build="luthier_mlflow.tracker:Tracker",
        )
    ]
