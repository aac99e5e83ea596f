"""luthier-mlflow keeps what every callback must keep."""

import pytest
from luthier.testing import conformance
from luthier_mlflow import luthier_callbacks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*")  # between MLflow and SQLAlchemy


@pytest.fixture(autouse=True)
def shared(store, monkeypatch):
    """One store for all runs, as MLflow takes a second to make one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


@conformance(luthier_callbacks(), vary=False)  # an address cannot be invented
def test_conforms(check):
    check()
