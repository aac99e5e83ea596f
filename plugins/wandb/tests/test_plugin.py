"""The plugin as it is listed and chosen: light to import, and clear where something is missing."""

import os
import subprocess
import sys

import pytest
from luthier import LuthierError
from luthier.plugins.options import describe_options
from luthier.plugins.structure import structure_value
from luthier_wandb import Wandb

LIST = """
import sys
from luthier.plugins.registry import Plugins
plugins = Plugins()
offer = plugins.get("callback", "wandb")
offer.record.options(project="p", tags=["a"])
print(offer.source.distribution, *sorted({"wandb", "requests", "torch"} & set(sys.modules)))
"""
MISSING = """
import sys, types
from luthier.plugins.registry import Plugins
sys.modules["wandb"] = {client}
plugins = Plugins()
offer = plugins.get("callback", "wandb")
try:
    plugins.build(offer, offer.record.options(mode="offline"))
except Exception as error:
    print(type(error).__name__, error.code, error)
"""
TELEMETRY = """
import contextlib, os, sys
sys.modules["wandb"] = None  # nothing is to be reported by this test
with contextlib.suppress(Exception):
    import luthier_wandb.tracker
print(os.environ["WANDB_ERROR_REPORTING"])
"""


def output(program: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | variables
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


def test_listing_and_choosing_it_imports_no_client():
    assert output(LIST) == "luthier-wandb"


@pytest.mark.parametrize("client", ["None", "types.ModuleType('wandb')"], ids=["absent", "only a folder named wandb"])
def test_a_missing_client_is_an_error_with_the_pip_line_when_the_callback_is_built(client):
    said = output(MISSING.replace("{client}", client))
    assert said.startswith("LuthierError dependency-missing callback 'wandb'")
    assert "pip install luthier-wandb" in said


def test_the_client_reports_nothing_home_unless_the_user_wants_it():
    assert output(TELEMETRY) == "false"
    assert output(TELEMETRY, WANDB_ERROR_REPORTING="true") == "true"


def test_every_option_says_what_it_means():
    names = "project run_name entity tags group notes mode dir base_url finish_timeout"
    assert [o.name for o in describe_options(Wandb)] == names.split()
    assert all(o.bounds.help.endswith(".") for o in describe_options(Wandb))


def test_no_option_takes_a_key():
    assert not [o.name for o in describe_options(Wandb) if "key" in o.name or "token" in o.name or "password" in o.name]


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"projekt": "x"}, "recipe-unknown-option", ("project",)),
        ({"mode": "on-line"}, "recipe-wrong-type", ("online",)),
        ({"tags": "a"}, "recipe-wrong-type", ("callbacks[0].tags",)),
        ({"finish_timeout": -1}, "recipe-out-of-range", ("finish_timeout",)),
    ],
)
def test_a_wrong_option_is_refused_by_name(given, code, said):
    with pytest.raises(LuthierError) as caught:
        structure_value(given, Wandb, "callbacks[0]")
    assert all(fact in str(caught.value) for fact in said)
    assert caught.value.code == code
