"""Every check of providers is proven by a broken one that it catches; the generated one passes all of them."""

import re

import pytest
from luthier.testing import checks_for, conformance
from luthier.testing.laws import Law
from luthier.testing.providers import provider_checks as provider
from mutants.providers import MUTANTS, SOUND, Fake


@conformance([SOUND], {"import_needs_no_torch": "its module was made in this process alone"}, fake=Fake)
def test_the_generated_provider_passes(check):
    check()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.caught_by)
def test_a_broken_provider_is_caught_by_the_check_named_for_its_fault(mutant):
    (check,) = [c for c in checks_for(mutant.record, fake=Fake) if c.name == mutant.caught_by]
    with pytest.raises(Exception) as caught:
        check()
    assert re.search(mutant.says, str(caught.value)), f"caught for another reason: {caught.value}"


def test_each_check_has_a_mutant():
    laws = {value.name for value in vars(provider).values() if isinstance(value, Law)}
    assert laws == {mutant.caught_by for mutant in MUTANTS}


def test_without_a_fake_only_the_record_is_checked():
    names = {check.name for check in checks_for(SOUND)}
    assert "options_are_frozen_and_described" in names
    assert not names & {mutant.caught_by for mutant in MUTANTS}
