"""The plugin as it is listed and chosen: light to import, and clear where something is missing or wrong."""

import json
import os
import subprocess
import sys

import pytest
from luthier import LuthierError
from luthier.plugins.options import describe_options
from luthier.plugins.structure import structure_value
from luthier.testing import expect_error
from luthier_trackio import Trackio

LIST = """
import sys
from luthier.plugins.registry import Plugins
plugins = Plugins()
offer = plugins.get("callback", "trackio")
offer.record.options(project="p")
print(offer.source.distribution, *sorted({"trackio", "huggingface_hub", "torch"} & set(sys.modules)))
"""
MISSING = """
import sys
from luthier.plugins.registry import Plugins
sys.modules["trackio"] = None
plugins = Plugins()
offer = plugins.get("callback", "trackio")
try:
    plugins.build(offer, offer.record.options())
except Exception as error:
    print(type(error).__name__, error.code, error)
"""


def output(program: str, **variables: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          env=os.environ | variables)  # fmt: skip
    return done.stdout.strip()


def test_listing_and_choosing_it_imports_no_library():
    assert output(LIST) == "luthier-trackio"


def test_a_missing_library_is_an_error_with_the_pip_line_when_the_callback_is_built():
    said = output(MISSING)
    assert said.startswith("LuthierError dependency-missing callback 'trackio'")
    assert "pip install luthier-trackio" in said


def test_every_option_says_what_it_means():
    names = "project run_name group space_id private server_url"
    assert [o.name for o in describe_options(Trackio)] == names.split()
    assert all(o.bounds.help.endswith(".") for o in describe_options(Trackio))


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"projekt": "x"}, "recipe-unknown-option"),
        ({"private": "maybe"}, "recipe-wrong-type"),
        ({"space_id": "a/b", "server_url": "http://localhost:1"}, "recipe-conflict"),
    ],
)
def test_a_wrong_option_is_refused_by_name(given, code):
    with pytest.raises(LuthierError) as caught:
        structure_value(given, Trackio, "callbacks[0]")
    assert next(iter(given)) in str(caught.value)
    assert caught.value.code == code


@pytest.mark.parametrize("url", ["http://user:hunter2@localhost:1", "http://localhost:1/?write_token=hunter2"])
def test_a_secret_in_the_address_is_refused_and_not_repeated(url):
    with expect_error("recipe-conflict", "Trackio.server_url", "TRACKIO_WRITE_TOKEN") as caught:
        Trackio(server_url=url)
    assert "hunter2" not in json.dumps(caught.value.to_dict())


@pytest.mark.parametrize(
    ("options", "code", "place", "remedy"),
    [
        ({"project": "registry-x"}, "recipe-out-of-range", "callback 'trackio': project", "another name"),
        ({"server_url": "localhost:7860"}, "recipe-out-of-range", "callback 'trackio': server_url", "http://"),
        ({"server_url": "http://localhost:1"}, "recipe-missing", "callback 'trackio'", "TRACKIO_WRITE_TOKEN"),
        ({"private": True}, "recipe-conflict", "callback 'trackio': private", "space_id"),
        ({"space_id": "team/dashboard"}, "recipe-missing", "callback 'trackio'", "HF_TOKEN"),
    ],
)
def test_what_the_library_would_refuse_is_an_error_when_the_callback_is_built(
    build, monkeypatch, options, code, place, remedy
):
    build()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)  # of the user who runs the tests
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    with expect_error(code, place) as caught:
        build(**options)
    assert remedy in caught.value.remedy


def test_a_space_is_refused_while_the_hub_must_not_be_asked(build, monkeypatch):
    build()
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    with expect_error("part-unsupported", "callback 'trackio'", "HF_HUB_OFFLINE"):
        build(space_id="team/dashboard")
