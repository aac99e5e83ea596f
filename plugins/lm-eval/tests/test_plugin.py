"""The plugin as it is listed and chosen: light to import, and clear where something is missing or wrong."""

import subprocess
import sys

import pytest
from luthier import LuthierError
from luthier.plugins.options import describe_options
from luthier.plugins.structure import structure_value
from luthier.testing import expect_error
from luthier_lm_eval import LmEval

LIST = """
import sys
from luthier.plugins.registry import Plugins
plugins = Plugins()
offer = plugins.get("benchmark", "lm_eval")
offer.record.options(limit=3)
print(offer.source.distribution, *sorted({"lm_eval", "datasets", "torch"} & set(sys.modules)))
"""
MISSING = """
import sys
from luthier.plugins.registry import Plugins
sys.modules["lm_eval"] = None
plugins = Plugins()
offer = plugins.get("benchmark", "lm_eval")
try:
    plugins.build(offer, offer.record.options())
except Exception as error:
    print(type(error).__name__, error.code, error)
"""


def output(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_listing_and_choosing_it_imports_no_harness():
    assert output(LIST) == "luthier-lm-eval"


def test_a_missing_harness_is_an_error_with_the_pip_line_when_the_benchmark_is_built():
    said = output(MISSING)
    assert said.startswith("LuthierError dependency-missing benchmark 'lm_eval'")
    assert "pip install luthier-lm-eval" in said


def test_every_option_says_what_it_means():
    assert all(o.bounds.help.endswith(".") for o in describe_options(LmEval))


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"limits": 1}, "recipe-unknown-option"),
        ({"limit": 0}, "recipe-out-of-range"),
        ({"num_fewshot": "five"}, "recipe-wrong-type"),
    ],
)
def test_a_wrong_option_is_refused_by_name(given, code):
    with pytest.raises(LuthierError) as caught:
        structure_value(given, LmEval, "benchmark")
    assert next(iter(given)) in str(caught.value)
    assert caught.value.code == code


def test_a_folder_of_tasks_that_is_not_there_is_refused(build):
    with expect_error("data-not-found", "benchmark 'lm_eval': include_path"):
        build(include_path="/no/such/folder").check(["capitals"])
