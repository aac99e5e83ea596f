"""The plugin as it is listed and chosen: light to import, and clear where something is missing."""

import os
import subprocess
import sys

import pytest
from luthier import LuthierError
from luthier.plugins.options import describe_options
from luthier.plugins.structure import structure_value
from luthier.testing import expect_error
from luthier_mlflow import Mlflow

LIST = """
import sys
from luthier.plugins.registry import Plugins
plugins = Plugins()
offer = plugins.get("callback", "mlflow")
offer.record.options(tags={"team": "search"})
print(offer.source.distribution, *sorted({"mlflow", "sqlalchemy", "torch"} & set(sys.modules)))
"""
MISSING = """
import sys
from luthier.plugins.registry import Plugins
sys.modules["mlflow"] = None
plugins = Plugins()
offer = plugins.get("callback", "mlflow")
try:
    plugins.build(offer, offer.record.options())
except Exception as error:
    print(type(error).__name__, error.code, error)
"""
TELEMETRY = """
import luthier_mlflow.tracker
from mlflow.telemetry import get_telemetry_client
print(get_telemetry_client())
"""
HEEDED = """
import contextlib, os, sys
sys.modules["mlflow"] = None  # nothing is to be reported by this test
with contextlib.suppress(Exception):
    import luthier_mlflow.tracker
print(os.environ["MLFLOW_DISABLE_TELEMETRY"])
"""


def output(program: str, **variables: str) -> str:
    """What a program prints in an environment where the client cannot tell that it is being tested."""
    kept = ("PATH", "HOME", "LANG", "SYSTEMROOT", "TMPDIR", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k in kept} | variables
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


def test_listing_and_choosing_it_imports_no_client():
    assert output(LIST) == "luthier-mlflow"


def test_a_missing_client_is_an_error_with_the_pip_line_when_the_callback_is_built():
    said = output(MISSING)
    assert said.startswith("LuthierError dependency-missing callback 'mlflow'")
    assert "pip install luthier-mlflow" in said


@pytest.mark.parametrize("library", ["sqlalchemy", "alembic"])
def test_a_local_store_without_its_library_is_an_error_and_a_server_needs_none(build, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with expect_error("dependency-missing", "callback 'mlflow'", library) as caught:
        build()
    assert caught.value.code == "dependency-missing"
    build(tracking_uri="http://127.0.0.1:9")


def test_the_client_reports_nothing_home():
    assert output(TELEMETRY) == "None"


def test_a_user_who_wants_the_reports_is_heeded():
    assert output(HEEDED, MLFLOW_DISABLE_TELEMETRY="false") == "false"


def test_every_option_says_what_it_means():
    assert [o.name for o in describe_options(Mlflow)] == ["tracking_uri", "experiment_name", "run_name", "tags"]
    assert all(o.bounds.help.endswith(".") for o in describe_options(Mlflow))


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"tracking_url": "x"}, "recipe-unknown-option", "tracking_uri"),
        ({"tags": ["a"]}, "recipe-wrong-type", "tags"),
        ({"tags": {"a": 1}}, "recipe-wrong-type", "tags.a"),
    ],
)
def test_a_wrong_option_is_refused_by_name(given, code, said):
    with pytest.raises(LuthierError, match=said) as caught:
        structure_value(given, Mlflow, "callbacks[0]")
    assert caught.value.code == code
