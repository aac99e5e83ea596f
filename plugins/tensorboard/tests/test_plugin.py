"""The plugin as it is listed and chosen: light to import, and clear where something is missing."""

import os
import subprocess
import sys

import pytest
from luthier import LuthierError
from luthier.plugins.options import describe_options
from luthier.plugins.registry import Plugins
from luthier.plugins.structure import structure_value
from luthier_tensorboard import TensorBoard

LIST = """
import sys
from luthier.plugins.registry import Plugins
plugins = Plugins()
offer = plugins.get("callback", "tensorboard")
offer.record.options(log_dir="logs")
print(offer.source.distribution, *sorted({"tensorboard", "tensorflow", "torch"} & set(sys.modules)))
"""
MISSING = """
import sys
from luthier.plugins.registry import Plugins
sys.modules["tensorboard"] = None
plugins = Plugins()
offer = plugins.get("callback", "tensorboard")
try:
    plugins.build(offer, offer.record.options())
except Exception as error:
    print(type(error).__name__, error.code, error)
"""


def output(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True)
    return done.stdout.strip()


def test_listing_and_choosing_it_imports_no_client():
    assert output(LIST) == "luthier-tensorboard"


def test_a_missing_client_is_an_error_with_the_pip_line_when_the_callback_is_built():
    said = output(MISSING)
    assert said.startswith("LuthierError dependency-missing callback 'tensorboard'")
    assert "pip install luthier-tensorboard" in said


def test_every_option_says_what_it_means():
    assert [o.name for o in describe_options(TensorBoard)] == ["log_dir"]
    assert all(o.bounds.help.endswith(".") for o in describe_options(TensorBoard))


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(LuthierError, match="logdir") as caught:
        structure_value({"logdir": "x"}, TensorBoard, "callbacks[0]")
    assert caught.value.code == "recipe-unknown-option"


def test_the_record_has_no_tags_so_that_any_run_can_be_watched():
    record = Plugins().get("callback", "tensorboard").record
    assert not record.needs | record.provides | record.conflicts
