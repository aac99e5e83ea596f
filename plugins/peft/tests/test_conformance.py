"""The conformance kit's adapter laws, each on each method with options that fit its tiny Llama.

The kit would also try PEFT's defaults, which do not fit layers of 32, and options drawn at random, most of which PEFT
refuses: so its laws are called with options of ours.
"""

import pytest
from luthier.testing import checks_for
from luthier_peft import luthier_adapters

from .conftest import every_method, fitting

RECORDS = {record.name.removeprefix("peft."): record for record in luthier_adapters()}
DRAWN = {"seed": 3, "lengths": [4, 7]}
ALONE = ("name_is_unique", "summary_is_one_line", "import_needs_no_torch")
OF_ADAPTERS = [
    check.name
    for check in checks_for(RECORDS["lora"])
    if check.law.function.__module__.startswith("luthier.testing.kinds.adapter_") and check.law.examples
]


def check_of(method, name):
    return next((c for c in checks_for(RECORDS[method], together=RECORDS.values()) if c.name == name), None)


@pytest.mark.parametrize("law", OF_ADAPTERS)
@pytest.mark.parametrize("method", every_method())
def test_keeps_the_laws_of_adapters(method, law):
    check = check_of(method, law)
    if check is None:
        pytest.skip("the record says that this does not apply")
    drawn = {name: DRAWN[name] for name in check.law.drawn}
    if "packing" in RECORDS[method].conflicts and law == "keeps_documents_apart":
        with pytest.raises(AssertionError, match="packed documents against separate"):
            check.law.function(check.subject, fitting(method), **drawn)
        return
    check.law.function(check.subject, fitting(method), **drawn)


def test_vectors_that_peft_makes_on_the_cpu_lie_where_the_weights_are():
    check = check_of("tinylora", "attaches_where_the_weights_are")
    check.law.function(check.subject, fitting("tinylora"), seed=3)


@pytest.mark.parametrize("method", RECORDS)
def test_options_are_frozen_described_and_survive_a_round_trip(method):
    for name in ("options_are_frozen_and_described", "options_survive_a_round_trip"):
        check = check_of(method, name)
        check.law.function(check.subject, fitting(method))


@pytest.mark.parametrize("law", ALONE)
def test_keeps_the_laws_of_records(law):
    for method in ("lora", "lily"):
        check = check_of(method, law)
        check()


@pytest.mark.parametrize("method", every_method(sample=("oft",)))
def test_trains_alike_on_two_sharded_ranks(method):
    checks = checks_for(RECORDS[method], examples=[fitting(method)])
    check = next(check for check in checks if check.name == "trains_alike_on_two_sharded_ranks")
    if method == "pvera":  # it draws numbers in each forward pass, as dropout does
        with pytest.raises(AssertionError, match="those of one rank"):
            check()
    else:
        check()
